"""The Python-backend model that Triton runs: onnxruntime on the RNN operator, each batch padded to its longest.

It runs inside Triton, in Triton's environment; Triton's dynamic batcher passes it the waiting requests.
"""

import json
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as backend  # type: ignore[import-not-found]  # Triton puts it on the path


class TritonPythonModel:
    """See Triton's Python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the graph that the configuration names."""
        file = json.loads(args["model_config"])["parameters"]["graph"]["string_value"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self._layers, _, self._hidden = self._session.get_inputs()[1].shape

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers all requests of a batch from one run."""
        inputs = [backend.get_input_tensor_by_name(request, "input").as_numpy() for request in requests]
        lengths = [backend.get_input_tensor_by_name(request, "lengths").as_numpy() for request in requests]
        steps = np.concatenate(lengths)[:, 0]
        x = np.zeros((len(steps), max(part.shape[1] for part in inputs), inputs[0].shape[2]), np.float32)
        row = 0
        for part in inputs:
            x[row : row + len(part), : part.shape[1]] = part
            row += len(part)
        state = np.zeros((self._layers, len(x), self._hidden), np.float32)
        logits = self._session.run(["logits"], {"input": x, "initial_state": state})[0]
        logits = logits[np.arange(len(steps)), steps - 1]
        ends = np.cumsum([len(part) for part in inputs])[:-1]
        return [
            backend.InferenceResponse([backend.Tensor("logits", np.ascontiguousarray(rows))])
            for rows in np.split(logits, ends)
        ]
