"""Requests of the Open Inference Protocol: decode, run in the engine or a session, encode."""

import asyncio
import time
from typing import NamedTuple

import numpy as np

from unroll_engine.errors import InvalidRequestError, RequestError
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array, ModelSpec, State
from unroll_engine.readout import classify
from unroll_proto.inference import service_pb2 as pb
from unroll_server import caller
from unroll_server.api.data_plane import DataPlane, check_answer, new_batch
from unroll_server.api.oip import tensors
from unroll_server.api.oip.request import (
    DEFAULT_OUTPUTS,
    Options,
    Wanted,
    options_of,
    outputs_of,
    version_of,
)
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
"""Fields of a request by the names that the catalog, the sessions and the engine give them."""

MAX_STATES_BYTES = 2**26
"""Bytes of the `states` of one response, at most."""


class _Results(NamedTuple):
    """The outputs of a request by name, each with the batch first.

    `logits` and `probabilities` are missing if there was no step.
    """

    model: Model
    arrays: dict[str, Float32Array]


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
            request: As the caller sent it.
            deadline: On the engine's clock, in seconds.

        Raises:
            RequestError: the request is refused, or failed.
        """
        stages = Stages()
        try:
            version = version_of(request.model_version, "model_version")
            options, wanted = options_of(request), outputs_of(request)
            deadline = min(deadline, time.monotonic() + options.timeout)
            if options.sequence is None:
                found = self._plane.catalog.find(request.model_name, version)
                stages.model = found.key
                inputs = tensors.decode(request, self._plane.limits)
                stages.decoded = time.perf_counter_ns()
                results = await self._run(found, inputs, wanted, deadline, stages)
            else:
                name = request.model_name or self._plane.catalog.find("", 0).key.name
                inputs = tensors.decode(request, self._plane.limits, shortest=0 if options.start or options.end else 1)
                stages.decoded = time.perf_counter_ns()
                results = await self._advance(name, version, options, inputs, wanted, deadline, stages)
            stages.computed = time.perf_counter_ns()
            response = _encode(request, results, wanted)
        except RequestError as error:
            if stages.model is not None:
                self.statistics.failed(stages.model, stages.begin)
            error.rename(_FIELDS)
            raise
        self.statistics.answered(results.model.spec.key, inputs.batch, stages)
        return response

    def expected_bytes(self, request: pb.ModelInferRequest) -> int:
        """Returns the bytes of the states in the response to a request, at most; 0 if it asks for none."""
        names = {output.name for output in request.outputs}
        shapes = [list(each.shape) for each in request.inputs if each.name == "input"]
        specs = [model.spec for model in self._plane.catalog.models if request.model_name in ("", model.spec.key.name)]
        finals = sum(name.startswith("final_") for name in names)
        if not (finals or "states" in names) or not specs or [len(shape) for shape in shapes] != [3]:
            return 0
        # Nothing is checked yet: a wrong shape will be refused.
        batch, steps = min(max(shapes[0][0], 0), self._plane.limits.max_sequences), max(shapes[0][1], 0)
        width = 4 * max(spec.hidden_size for spec in specs)
        states = min(batch * steps * width, MAX_STATES_BYTES) if "states" in names else 0
        final = finals * batch * max(spec.num_layers for spec in specs) * width
        return states + final

    async def _run(
        self,
        version: LoadedVersion,
        inputs: tensors.Inputs,
        wanted: tuple[Wanted, ...],
        deadline: float,
        stages: Stages,
    ) -> _Results:
        """Runs a batch of whole sequences."""
        model, spec = version.model, version.spec
        _check_outputs(wanted, inputs, spec)
        rows, offsets = tensors.ragged(inputs, spec)
        state = tensors.initial_state(inputs, spec)
        names = {each.name for each in wanted}
        if "states" not in names:
            batch = new_batch(model, rows, offsets, state, any(map(_is_final, names)), deadline)
            await self._plane.engine.run(batch)
            stages.waited = int(batch.waited * 1e9)
            return _Results(model, _arrays(spec, batch.logits, batch.probabilities, batch.final_state))
        # Between two pieces of a sequence the engine may have no work of the model.
        with version.acquired():
            return _Results(
                model, await self._run_keeping_states(model, inputs, rows, offsets.tolist(), state, deadline)
            )

    async def _run_keeping_states(
        self,
        model: Model,
        inputs: tensors.Inputs,
        rows: Float32Array,
        offsets: list[int],
        state: State | None,
        deadline: float,
    ) -> dict[str, Float32Array]:
        """Runs each sequence as a chunk, which reports the states of all steps; a batch reports the last ones."""
        spec, engine = model.spec, self._plane.engine
        logits = np.empty((inputs.batch, spec.output_size), np.float32)
        states = np.zeros((inputs.batch, inputs.longest, spec.hidden_size), np.float32)
        final = spec.initial_state(inputs.batch)

        async def run(index: int, first: int, end: int) -> None:
            initial = None if state is None else tuple(array[:, index] for array in state)
            values = rows[first:end]
            own_logits, own_states, own_final = await run_chunk(engine, model, values, initial, deadline)
            logits[index] = own_logits[-1]
            states[index, : end - first] = own_states
            for kept, value in zip(final, own_final, strict=True):
                kept[:, index] = value

        try:
            async with asyncio.TaskGroup() as group:
                for index in range(inputs.batch):
                    group.create_task(run(index, offsets[index], offsets[index + 1]))
        except ExceptionGroup as errors:
            # All were refused for the same reason, or one failed and the others were cancelled.
            raise errors.exceptions[0] from None
        return _arrays(spec, logits, classify(logits, spec.step)[0], final) | {"states": states}

    async def _advance(
        self,
        name: str,
        version: int,
        options: Options,
        inputs: tensors.Inputs,
        wanted: tuple[Wanted, ...],
        deadline: float,
        stages: Stages,
    ) -> _Results:
        """Advances a sequence whose state a session keeps."""
        if inputs.batch != 1:
            problem = f"`input` has {inputs.batch} sequences, 1 allowed with a sequence_id"
            raise InvalidRequestError(problem, "inputs")
        state: State | None = None
        if options.start:
            # Chosen here, so that the version that is checked is the one that runs.
            spec = self._plane.catalog.find(name, version).spec
            version = spec.key.version
            state = tensors.initial_state(inputs, spec)
        elif inputs.initial:
            problem = f"`{min(inputs.initial)}` is only for the request that begins the sequence"
            raise InvalidRequestError(problem, "inputs")
        keep_states = any(each.name == "states" for each in wanted)

        def values(spec: ModelSpec) -> Float32Array:
            # All refusals are here: later the sequence has advanced.
            stages.model = spec.key
            _check_outputs(wanted, inputs, spec)
            return tensors.ragged(inputs, spec)[0]

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
            keep_states=keep_states,
        )
        try:
            done = await self._plane.sessions.advance(advance)
        except SessionNotFoundError:
            problem = f"sequence {options.sequence!r} has not begun; its first request needs sequence_start"
            raise InvalidRequestError(problem, "parameters[sequence_id]") from None
        last = done.logits[-1:]
        final = tuple(array[:, np.newaxis] for array in done.state)
        own = done.model.spec
        arrays = _arrays(own, last, classify(last, own.step)[0], final) if len(last) else _final(own, final)
        if keep_states:
            arrays["states"] = np.zeros((1, inputs.longest, done.model.spec.hidden_size), np.float32)
            arrays["states"][0, : len(done.states)] = done.states
        return _Results(done.model, arrays)


def _check_outputs(wanted: tuple[Wanted, ...], inputs: tensors.Inputs, spec: ModelSpec) -> None:
    check_answer(spec, inputs.batch, any(_is_final(each.name) for each in wanted), "inputs")
    size = inputs.batch * inputs.longest * spec.hidden_size * 4
    finals = {f"final_{name}" for name, *_ in spec.states}
    for name, classes in wanted:
        if _is_final(name) and name not in finals:
            raise InvalidRequestError(f"{spec.key} has no `{name}`", "outputs")
        if name == "states" and size > MAX_STATES_BYTES:
            problem = f"`states` would take {size} bytes, at most {MAX_STATES_BYTES} allowed"
            raise InvalidRequestError(problem, "outputs")
        if name in DEFAULT_OUTPUTS and not inputs.shortest:
            raise InvalidRequestError(f"`{name}` needs a timestep, and a sequence has none", "outputs")
        if name == "logits" and classes and spec.output_size == 1:
            problem = "`logits` of a binary model is one value; ask for the classification of `probabilities`"
            raise InvalidRequestError(problem, "outputs")


def _is_final(name: str) -> bool:
    """Returns True if an output is a state tensor after the last steps."""
    return name.startswith("final_")


def _arrays(
    spec: ModelSpec, logits: Float32Array, probabilities: Float32Array, final: State | None
) -> dict[str, Float32Array]:
    """Returns outputs by name; the state is given as [num_layers, batch, hidden_size] each."""
    arrays = {"logits": logits, "probabilities": probabilities}
    return arrays if final is None else arrays | _final(spec, final)


def _final(spec: ModelSpec, state: State) -> dict[str, Float32Array]:
    return {f"final_{name}": array.transpose(1, 0, 2) for (name, *_), array in zip(spec.states, state, strict=True)}


def _encode(request: pb.ModelInferRequest, results: _Results, wanted: tuple[Wanted, ...]) -> pb.ModelInferResponse:
    spec, arrays = results.model.spec, results.arrays
    response = pb.ModelInferResponse(model_name=spec.key.name, model_version=str(spec.key.version), id=request.id)
    for name, classes in wanted or tuple(Wanted(name, 0) for name in DEFAULT_OUTPUTS if name in arrays):
        if classes:
            tensors.encode_classes(response, name, arrays[name], classes, spec.class_labels)
        else:
            tensors.encode(response, name, arrays[name])
    return response
