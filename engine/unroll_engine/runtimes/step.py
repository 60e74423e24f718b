"""ONNX Runtime on the graph of a step model: one run per timestep, for all lanes."""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unroll_engine.models.spec import Float32Array, State
from unroll_engine.runtimes.base import ArrayResult, TickResult
from unroll_engine.runtimes.step_session import RUN_FAILURES, GraphRuntime
from unroll_proto import step_model
from unroll_proto.step_model import StepTensor
from unroll_proto.v1 import bundle_pb2 as pb


class StepRuntime(GraphRuntime):
    """Runs the graph of one timestep, for all lanes together; see GraphRuntime."""

    def __init__(self, model: bytes, step: pb.StepModel) -> None:
        super().__init__(model, step)
        self._alone = step.alone
        self._next = [each.next for each in step.states]
        self._wanted = [each.name for each in self._outputs] + [name for name in self._next if name]
        self._try(step)

    def run(self, x: Float32Array, state: State) -> ArrayResult:
        """See Runtime.run. A lane for which the graph fails, such as by an index out of range, gives NaN."""
        steps, lanes, _ = x.shape
        results = np.empty((steps, lanes, self._width), np.float32)
        final: State | None = None
        if not self._alone:
            with suppress(*RUN_FAILURES):
                final = self._run(x, state, results)
        if final is None:
            final = self._run_apart(x, state, results)
        return TickResult(results, np.empty((steps, lanes, 0), np.float32), final)

    def _try(self, step: pb.StepModel) -> None:
        """Runs a step of zeros. A failure here is the graph's own, not caused by a caller's values."""
        lanes = 1 if self._alone else 2
        state = []
        for described, tensor in zip(step.states, self._states, strict=True):
            shape = math.prod(tensor.before), lanes, math.prod(tensor.after)
            state.append(np.zeros(shape, tensor.dtype))
            state[-1][:] = step_model.initial_of(described, tensor).reshape(shape[0], 1, shape[2])
        values = np.zeros((1, lanes, sum(tensor.size for tensor in self._inputs)), np.float32)
        self._run(values, tuple(state), np.empty((1, lanes, self._width), np.float32))

    def _run_apart(self, x: Float32Array, state: State, results: Float32Array) -> State:
        """Runs the lanes one at a time, so that none is affected by the failure of another."""
        final = tuple(array.copy() for array in state)
        for lane in range(x.shape[1]):
            one = slice(lane, lane + 1)
            try:
                ended = self._run(x[:, one], tuple(array[:, one] for array in state), results[:, one])
            except RUN_FAILURES:
                results[:, lane] = np.nan
                continue
            for whole, part in zip(final, ended, strict=True):
                whole[:, one] = part
        return final

    def _run(self, x: Float32Array, state: State, results: Float32Array) -> State:
        lanes = x.shape[1]
        current: list[NDArray[Any]] = [
            np.ascontiguousarray(array).reshape(tensor.batch_dims(lanes))
            for array, tensor in zip(state, self._states, strict=True)
        ]
        for values, result in zip(x, results, strict=True):
            feeds = {tensor.name: array for tensor, array in zip(self._states, current, strict=True)}
            feeds |= {tensor.name: array for tensor, array in zip(self._inputs, self._parts(values), strict=True)}
            found = self._session.run(self._wanted, feeds)
            self._join(found[: len(self._outputs)], result)
            after = iter(found[len(self._outputs) :])
            for index, name in enumerate(self._next):
                if name:
                    current[index] = _checked(next(after), self._states[index], lanes)
        return tuple(
            [array.reshape(rows.shape[0], lanes, rows.shape[2]) for array, rows in zip(current, state, strict=True)]
        )

    def _parts(self, values: Float32Array) -> Sequence[NDArray[Any]]:
        """Cuts the values of a timestep, [lanes, input_size], into the inputs of the graph."""
        lanes = len(values)
        parts: list[NDArray[Any]] = []
        begin = 0
        for tensor in self._inputs:
            end = begin + tensor.size
            part = values[:, begin:end].reshape((lanes, *tensor.dims) if tensor.batched else tensor.dims)
            if tensor.before and tensor.batched:
                part = np.moveaxis(part, 0, len(tensor.before))
            parts.append(np.ascontiguousarray(part, tensor.dtype))
            begin = end
        return parts

    def _join(self, arrays: Sequence[NDArray[Any]], result: Float32Array) -> None:
        """Concatenates the outputs of the graph into `result`, [lanes, output_size]."""
        lanes = len(result)
        begin = 0
        for array, tensor in zip(arrays, self._outputs, strict=True):
            end = begin + tensor.size
            values = _checked(array, tensor, lanes)
            if tensor.before and tensor.batched:
                values = np.moveaxis(values, len(tensor.before), 0)
            result[:, begin:end] = values.reshape(lanes, -1)
            begin = end


def _checked(array: NDArray[Any], tensor: StepTensor, lanes: int) -> NDArray[Any]:
    """Returns the result of a graph; raises ValueError if its shape or dtype is not the manifest's."""
    expected = tensor.batch_dims(lanes)
    if array.shape != expected or array.dtype != tensor.dtype:
        problem = f"{tensor.name!r} gives {array.dtype} {list(array.shape)}, {tensor.dtype} {list(expected)} expected"
        raise ValueError(problem)
    return array
