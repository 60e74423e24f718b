"""Requests of the Open Inference Protocol: decode, run in the engine or a session, encode."""

import asyncio
import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unroll_engine.errors import InvalidRequestError, RequestError
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array, ModelSpec, State
from unroll_engine.readout import classify
from unroll_proto.inference import service_pb2 as pb
from unroll_server import caller
from unroll_server.api.data_plane import DataPlane, check_answer, new_batch
from unroll_server.api.oip import tensors
from unroll_server.api.oip.request import (
    CLASSIFIED,
    Options,
    Wanted,
    options_of,
    version_of,
    wanted_outputs,
)
from unroll_server.api.oip.signature import default_outputs
from unroll_server.api.oip.statistics import Stages, Statistics
from unroll_server.errors import SessionNotFoundError
from unroll_server.repository.version import LoadedVersion
from unroll_server.sequence import run_chunk
from unroll_server.sessions.chunk import Advance

_FIELDS = {
    "model": "model_name",
    "version": "model_version",
    "session_id": "parameters[sequence_id]",
    "values": "inputs",
}
"""Fields of a request by their names in the catalog, the sessions and the engine."""

MAX_STATES_BYTES = 2**26
"""Most bytes of the `states` of one response."""


class _Asked(NamedTuple):
    """A request that was decoded for a model."""

    inputs: tensors.Inputs
    wanted: tuple[Wanted, ...]


class _Results(NamedTuple):
    """The outputs of a request by name, each with the batch first.

    `logits` and `probabilities` of a classifier are missing if there was no step.
    """

    model: Model
    asked: _Asked
    arrays: dict[str, NDArray[Any]]


class Inference:
    """Answers requests.

    Args:
        plane: Finds the models and runs them.
        statistics: Counts the requests.

    Attributes:
        statistics: As given.
    """

    def __init__(self, plane: DataPlane, statistics: Statistics) -> None:
        self._plane = plane
        self.statistics = statistics

    async def answer(self, request: pb.ModelInferRequest, deadline: float) -> pb.ModelInferResponse:
        """Returns the response to a request.

        Args:
            request: The caller's request.
            deadline: On the engine's clock, in seconds.

        Raises:
            RequestError: the request was refused or failed.
        """
        stages = Stages()
        try:
            version = version_of(request.model_version, "model_version")
            options = options_of(request)
            deadline = min(deadline, time.monotonic() + options.timeout)
            if options.sequence is None:
                found = self._plane.catalog.find(request.model_name, version)
                stages.model = found.key
                asked = self._read(request, found.spec)
                stages.decoded = time.perf_counter_ns()
                results = await self._run(found, asked, deadline, stages)
            else:
                results = await self._advance(request, version, options, deadline, stages)
            stages.computed = time.perf_counter_ns()
            response = _encode(request, results)
        except RequestError as error:
            if stages.model is not None:
                self.statistics.failed(stages.model, stages.begin)
            error.rename(_FIELDS)
            raise
        self.statistics.answered(results.model.spec.key, results.asked.inputs.batch, stages)
        return response

    def expected_bytes(self, request: pb.ModelInferRequest) -> int:
        """Returns the bytes of states and steps in the response to a request, at most; 0 if it asks for none."""
        names = {output.name for output in request.outputs}
        models = [each for each in self._plane.catalog.models if request.model_name in ("", each.spec.key.name)]
        return max((self._expected(request, names, model.spec) for model in models), default=0)

    def _expected(self, request: pb.ModelInferRequest, names: set[str], spec: ModelSpec) -> int:
        if spec.whole:
            return 0
        width = 4 * (spec.output_size if spec.step else spec.hidden_size if "states" in names else 0)
        final = sum(tensor.nbytes for tensor in spec.states if f"final_{tensor.name}" in names)
        shape = next((list(each.shape) for each in request.inputs if each.name == spec.inputs[0].name), [])
        if len(shape) < 2:
            return 0
        # Nothing is checked yet: a wrong shape will be refused.
        batch, steps = min(max(shape[0], 0), self._plane.limits.max_sequences), max(shape[1], 0)
        return min(batch * steps * width, MAX_STATES_BYTES) + batch * final

    def _read(self, request: pb.ModelInferRequest, spec: ModelSpec, shortest: int = 1) -> _Asked:
        """Decodes a request for a model; sequences have at least `shortest` timesteps."""
        wanted = wanted_outputs(request, spec)
        inputs = tensors.decode(request, spec, self._plane.limits, shortest)
        _check_outputs(wanted, inputs, spec)
        return _Asked(inputs, wanted)

    async def _run(self, version: LoadedVersion, asked: _Asked, deadline: float, stages: Stages) -> _Results:
        """Runs a batch of whole sequences."""
        model, spec = version.model, version.spec
        rows, offsets = tensors.ragged(asked.inputs)
        state = tensors.initial_state(asked.inputs, spec)
        names = {each.name for each in asked.wanted}
        if spec.whole or not (spec.step or "states" in names):
            batch = new_batch(model, rows, offsets, state, any(map(_is_final, names)), deadline)
            await self._plane.engine.run(batch)
            stages.waited = int(batch.waited * 1e9)
            if spec.whole:
                return _Results(model, asked, spec.named_outputs(batch.logits))
            final = {} if batch.final_state is None else _final(spec, batch.final_state)
            return _Results(model, asked, {"logits": batch.logits, "probabilities": batch.probabilities} | final)
        # Between two pieces of a sequence the engine may have no work of the model.
        with version.acquired():
            arrays = await self._run_steps(model, asked.inputs, rows, offsets.tolist(), state, deadline)
            return _Results(model, asked, arrays)

    async def _run_steps(
        self,
        model: Model,
        inputs: tensors.Inputs,
        rows: Float32Array,
        offsets: list[int],
        state: State | None,
        deadline: float,
    ) -> dict[str, NDArray[Any]]:
        """Runs each sequence as a chunk, which reports all steps; a batch reports the last ones."""
        await caller.in_task()
        spec, engine = model.spec, self._plane.engine
        logits = np.zeros((inputs.batch, inputs.longest, spec.output_size), np.float32)
        states = np.zeros((inputs.batch, inputs.longest, spec.hidden_size), np.float32)
        final = spec.initial_state(inputs.batch)

        async def run(index: int, first: int, end: int) -> None:
            initial = None if state is None else tuple(array[:, index] for array in state)
            values = rows[first:end]
            own_logits, own_states, own_final = await run_chunk(engine, model, values, initial, deadline)
            logits[index, : end - first] = own_logits
            states[index, : end - first] = own_states
            for kept, value in zip(final, own_final, strict=True):
                kept[:, index] = value

        try:
            async with asyncio.TaskGroup() as group:
                for index in range(inputs.batch):
                    group.create_task(run(index, offsets[index], offsets[index + 1]))
        except ExceptionGroup as errors:
            # All were refused for one reason, or one failed and the others were cancelled.
            raise errors.exceptions[0] from None
        return _arrays(spec, logits, states, np.diff(offsets), final)

    async def _advance(
        self, request: pb.ModelInferRequest, version: int, options: Options, deadline: float, stages: Stages
    ) -> _Results:
        """Advances a sequence whose state a session keeps."""
        await caller.in_task()
        name = request.model_name or self._plane.catalog.find("", 0).key.name
        asked: _Asked | None = None

        def read(spec: ModelSpec) -> _Asked:
            found = self._read(request, spec, shortest=0 if options.start or options.end else 1)
            if found.inputs.batch != 1:
                problem = f"the inputs are of {found.inputs.batch} sequences, 1 allowed with a sequence_id"
                raise InvalidRequestError(problem, "inputs")
            if found.inputs.initial and not options.start:
                problem = f"`{min(found.inputs.initial)}` is only for the request that begins the sequence"
                raise InvalidRequestError(problem, "inputs")
            stages.decoded = time.perf_counter_ns()
            return found

        def values(spec: ModelSpec) -> Float32Array:
            # All refusals come first: later the sequence has advanced.
            nonlocal asked
            stages.model = spec.key
            asked = read(spec)
            return tensors.ragged(asked.inputs)[0]

        state: State | None = None
        if options.start:
            # Chosen here, so that the checked version is the one that runs.
            spec = self._plane.catalog.find(name, version).spec
            version = spec.key.version
            state = tensors.initial_state(read(spec).inputs, spec)
        advance = Advance(
            owner=caller.current.get().identity,
            session_id=options.session_id(name),
            model=name,
            version=version,
            start=options.start,
            end=options.end,
            first_step=None,
            values=values,
            deadline=deadline,
            initial_state=None if state is None else tuple(array[:, 0] for array in state),
            keep_states=any(output.name == "states" for output in request.outputs),
        )
        try:
            done = await self._plane.sessions.advance(advance)
        except SessionNotFoundError:
            problem = f"sequence {options.sequence!r} has not begun; its first request needs sequence_start"
            raise InvalidRequestError(problem, "parameters[sequence_id]") from None
        assert asked is not None
        own, steps, longest = done.model.spec, len(done.logits), asked.inputs.longest
        logits = np.zeros((1, longest, own.output_size), np.float32)
        states = np.zeros((1, longest, own.hidden_size), np.float32)
        logits[0, :steps] = done.logits
        states[0, : len(done.states)] = done.states
        final = tuple(array[:, np.newaxis] for array in done.state)
        return _Results(done.model, asked, _arrays(own, logits, states, np.array([steps]), final))


def _check_outputs(wanted: tuple[Wanted, ...], inputs: tensors.Inputs, spec: ModelSpec) -> None:
    check_answer(spec, inputs.batch, any(_is_final(each.name) for each in wanted), "inputs")
    if spec.whole:
        return
    steps = inputs.batch * inputs.longest * 4
    if spec.step and steps * spec.output_size > MAX_STATES_BYTES:
        problem = f"the outputs would take {steps * spec.output_size} bytes, at most {MAX_STATES_BYTES} allowed"
        raise InvalidRequestError(problem, "outputs")
    if spec.step:
        return
    for name, classes in wanted:
        if name == "states" and steps * spec.hidden_size > MAX_STATES_BYTES:
            problem = f"`states` would take {steps * spec.hidden_size} bytes, at most {MAX_STATES_BYTES} allowed"
            raise InvalidRequestError(problem, "outputs")
        if name in CLASSIFIED and not inputs.shortest:
            raise InvalidRequestError(f"`{name}` needs a timestep, and a sequence has none", "outputs")
        if name == "logits" and classes and spec.output_size == 1:
            problem = "`logits` of a binary model is one value; ask for the classification of `probabilities`"
            raise InvalidRequestError(problem, "outputs")


def _is_final(name: str) -> bool:
    """Returns True if an output is a state tensor after the last steps."""
    return name.startswith("final_")


def _arrays(
    spec: ModelSpec, logits: Float32Array, states: Float32Array, lengths: NDArray[np.int64], final: State
) -> dict[str, NDArray[Any]]:
    """Returns outputs by name.

    Args:
        spec: The model.
        logits: Outputs of its steps, [batch, time, output_size].
        states: Likewise, [batch, time, hidden_size].
        lengths: Timesteps of each sequence; if any is 0, a classifier has no logits.
        final: States after the last steps, [rows, batch, size] each.
    """
    batch, time_, size = logits.shape
    if spec.step:
        named = spec.named_outputs(logits.reshape(batch * time_, size))
        arrays = {name: array.reshape(batch, time_, *array.shape[1:]) for name, array in named.items()}
        return arrays | _final(spec, final)
    arrays = {"states": states}
    if lengths.all():
        last = logits[np.arange(batch), lengths - 1]
        arrays |= {"logits": last, "probabilities": classify(last)[0]}
    return arrays | _final(spec, final)


def _final(spec: ModelSpec, state: State) -> dict[str, NDArray[Any]]:
    return {f"final_{tensor.name}": array.transpose(1, 0, 2) for tensor, array in zip(spec.states, state, strict=True)}


def _encode(request: pb.ModelInferRequest, results: _Results) -> pb.ModelInferResponse:
    spec, arrays = results.model.spec, results.arrays
    response = pb.ModelInferResponse(model_name=spec.key.name, model_version=str(spec.key.version), id=request.id)
    default = tuple(Wanted(name, 0) for name in default_outputs(spec) if name in arrays)
    for name, classes in results.asked.wanted or default:
        if classes:
            tensors.encode_classes(response, name, arrays[name], classes, spec.class_labels)
        else:
            tensors.encode(response, name, arrays[name])
    return response
