"""ONNX Runtime on a graph of whole sequences: one run for each."""

import numpy as np

from unroll_engine.models.spec import Float32Array, State
from unroll_engine.runtimes.base import ArrayResult, TickResult
from unroll_engine.runtimes.step_session import RUN_FAILURES, GraphRuntime
from unroll_proto import step_model
from unroll_proto.v1 import bundle_pb2 as pb


class WholeRuntime(GraphRuntime):
    """Runs a graph of whole sequences, a sequence at a time: its bits depend on no other. See GraphRuntime."""

    def __init__(self, model: bytes, step: pb.StepModel) -> None:
        super().__init__(model, step)
        (self._input,) = self._inputs
        self._batch_axis = 1 if step.inputs[0].shape[0] == step_model.TIME else 0
        self._names = [each.name for each in self._outputs]
        # A failure here is the graph's own, not caused by a caller's values.
        self.run_one(np.zeros((8, self._input.size), np.float32))

    def run_one(self, values: Float32Array) -> Float32Array:
        """Runs a sequence, [steps, input_size]; returns its outputs, concatenated to [output_size].

        Raises:
            ValueError: an output has another size or number format than the manifest says.
        """
        shaped = values.reshape(len(values), *self._input.dims).astype(self._input.dtype, copy=False)
        found = self._session.run(self._names, {self._input.name: np.expand_dims(shaped, self._batch_axis)})
        result = np.empty(self._width, np.float32)
        begin = 0
        for array, tensor in zip(found, self._outputs, strict=True):
            if array.size != tensor.size or array.dtype != tensor.dtype:
                problem = f"{tensor.name!r} gives {array.dtype} {list(array.shape)}"
                raise ValueError(f"{problem}, {tensor.dtype} {list(tensor.dims)} expected")
            result[begin : begin + tensor.size] = array.reshape(-1)
            begin += tensor.size
        return result

    def run(self, x: Float32Array, state: State) -> ArrayResult:
        """Runs whole sequences; see Runtime.run.

        The results of a sequence are those of all its steps together, and so the same at every step. A sequence for
        which the graph fails, such as by an index out of range, gives NaN.
        """
        steps, lanes, _ = x.shape
        results = np.full((lanes, self._width), np.nan, np.float32)
        for lane in range(lanes):
            try:
                results[lane] = self.run_one(x[:, lane])
            except RUN_FAILURES:
                continue
        return TickResult(
            np.broadcast_to(results, (steps, *results.shape)), np.empty((steps, lanes, 0), np.float32), ()
        )
