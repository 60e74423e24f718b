"""ModelStatistics: counts and durations of each model's requests, summed over all workers."""

import os
import time

import numpy as np

from unroll_engine.models.spec import ModelKey
from unroll_proto.inference import service_pb2 as pb
from unroll_server.telemetry.metrics import figures as place
from unroll_server.telemetry.metrics.memory import Figures, Memory

_KIND, _LATEST = "inference", "inference-latest"
# Indices of a model's numbers: counts, and sums of nanoseconds.
_ANSWERED, _ANSWERING, _FAILED, _FAILING, _SEQUENCES, _DECODING, _WAITING, _RUNNING, _ENCODING = range(9)
_SIZE = 9

_Own = tuple["memoryview[float]", "memoryview[float]"]


class Stages:
    """Times of a request's stages, by time.perf_counter_ns.

    Attributes:
        begin: Time of its arrival.
        decoded: Time when it was decoded.
        computed: Time when its results were computed.
        waited: Nanoseconds in the queue between the two, if measured.
        model: The model, once known.
    """

    __slots__ = ("begin", "computed", "decoded", "model", "waited")

    def __init__(self) -> None:
        self.begin = self.decoded = self.computed = time.perf_counter_ns()
        self.waited = 0
        self.model: ModelKey | None = None


class Statistics:
    """Counts the requests of the Open Inference Protocol by model.

    Args:
        memory: The counters of all workers.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._figures: dict[ModelKey, _Own] = {}

    def answered(self, model: ModelKey, sequences: int, stages: Stages) -> None:
        """Counts an answered request.

        Args:
            model: The model that ran it.
            sequences: Sequences in the request.
            stages: Times of its stages.
        """
        figures, latest = self._of(model)
        now = time.perf_counter_ns()
        figures[_ANSWERED] += 1
        figures[_ANSWERING] += now - stages.begin
        figures[_SEQUENCES] += sequences
        figures[_DECODING] += stages.decoded - stages.begin
        figures[_WAITING] += stages.waited
        figures[_RUNNING] += max(stages.computed - stages.decoded - stages.waited, 0)
        figures[_ENCODING] += now - stages.computed
        latest[0] = time.time_ns() // 1_000_000

    def failed(self, model: ModelKey, begin: int) -> None:
        """Counts a request that was refused or failed."""
        figures, _ = self._of(model)
        figures[_FAILED] += 1
        figures[_FAILING] += time.perf_counter_ns() - begin

    def of(self, models: list[ModelKey]) -> pb.ModelStatisticsResponse:
        """Returns the statistics of models, in their order."""
        requests = self._memory.sums(_KIND, _SIZE)
        engine = self._memory.sums("model", place.MODEL_SIZE)
        latest: dict[str, float] = {}
        for name, figures in self._memory.sums(_LATEST, 1).items():
            _, _, model = name.partition(" ")
            latest[model] = max(latest.get(model, 0.0), float(figures[0]))
        none = np.zeros(_SIZE), np.zeros(place.MODEL_SIZE)
        return pb.ModelStatisticsResponse(
            model_stats=[
                _statistics(
                    key, requests.get(str(key), none[0]), engine.get(str(key), none[1]), latest.get(str(key), 0.0)
                )
                for key in models
            ]
        )

    def _of(self, model: ModelKey) -> _Own:
        if model not in self._figures:
            # The latest time can't be summed over processes.
            own = self._memory.of(_LATEST, f"{os.getpid()} {model}", 1)
            self._figures[model] = self._memory.of(_KIND, str(model), _SIZE), own
        return self._figures[model]


def _statistics(key: ModelKey, requests: Figures, engine: Figures, latest: float) -> pb.ModelStatistics:
    answered = requests[_ANSWERED]
    return pb.ModelStatistics(
        name=key.name,
        version=str(key.version),
        last_inference=int(latest),
        inference_count=int(requests[_SEQUENCES]),
        execution_count=int(engine[place.TICK + 1 : place.WIDTH].sum()),
        inference_stats=pb.InferStatistics(
            success=_duration(answered, requests[_ANSWERING]),
            fail=_duration(requests[_FAILED], requests[_FAILING]),
            queue=_duration(answered, requests[_WAITING]),
            compute_input=_duration(answered, requests[_DECODING]),
            compute_infer=_duration(answered, requests[_RUNNING]),
            compute_output=_duration(answered, requests[_ENCODING]),
        ),
    )


def _duration(count: float, nanoseconds: float) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=int(count), ns=int(nanoseconds))
