"""ONNX Runtime: the Scan form on CPU, the RNN operator on CUDA (cuDNN)."""

import os

# Read when the library is loaded; since 1.29 its Linux builds send telemetry by default.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime

from unroll_engine.errors import RuntimeUnavailableError
from unroll_engine.models.spec import Float32Array, State
from unroll_engine.runtimes.base import TickResult
from unroll_proto import bundle

onnxruntime.disable_telemetry_events()

_OUTPUTS = ["logits", "states", "final_state"]


def session_options() -> onnxruntime.SessionOptions:
    """The options of the parity proof: one thread, so that no sum is split by load."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    return options


class OnnxCpuRuntime:
    """Runs the Scan form, time-major, on one core, with the same bits for a lane in any tick.

    Args:
        model: Content of `model.scan.onnx`.
    """

    name = "onnx"
    device = "cpu"
    artifact = bundle.ONNX_SCAN
    bitwise = True

    def __init__(self, model: bytes) -> None:
        self._session = onnxruntime.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"])

    def run(self, x: Float32Array, state: State) -> TickResult:
        """See Runtime.run."""
        logits, states, final = self._session.run(_OUTPUTS, {"input": x, "initial_state": state[0]})
        return TickResult(logits, states, (final,))


class OnnxOperatorRuntime:
    """Runs the RNN operator on one core, within the tolerance of eager PyTorch, not to the bit.

    Args:
        model: Content of `model.onnx`.
    """

    name = "onnx"
    device = "cpu"
    artifact = bundle.ONNX_RNN
    bitwise = False

    def __init__(self, model: bytes) -> None:
        self._session = onnxruntime.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"])

    def run(self, x: Float32Array, state: State) -> TickResult:
        """See Runtime.run."""
        return _run_batch_major(self._session, x, state)


class OnnxCudaRuntime:
    """Runs the RNN operator on cuDNN, within the tolerance of eager PyTorch, not to the bit.

    Args:
        model: Content of `model.onnx`.

    Raises:
        RuntimeUnavailableError: this onnxruntime has no CUDA provider, or there is no CUDA device.
    """

    name = "onnx"
    device = "cuda"
    artifact = bundle.ONNX_RNN
    bitwise = False

    def __init__(self, model: bytes) -> None:
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise RuntimeUnavailableError("device cuda: this onnxruntime has no CUDA provider; install onnxruntime-gpu")
        # TF32 keeps 10 bits of the mantissa, far outside the tolerance that was proven.
        providers = [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(model, session_options(), providers=providers)
        if "CUDAExecutionProvider" not in self._session.get_providers():
            raise RuntimeUnavailableError("device cuda: onnxruntime found no CUDA device that it can use")

    def run(self, x: Float32Array, state: State) -> TickResult:
        """See Runtime.run."""
        return _run_batch_major(self._session, x, state)


def _run_batch_major(session: onnxruntime.InferenceSession, x: Float32Array, state: State) -> TickResult:
    feeds = {"input": np.ascontiguousarray(x.transpose(1, 0, 2)), "initial_state": state[0]}
    logits, states, final = session.run(_OUTPUTS, feeds)
    return TickResult(logits.transpose(1, 0, 2), states.transpose(1, 0, 2), (final,))
