"""ONNX Runtime: the Scan form on CPU, the recurrent operators on CUDA (cuDNN)."""

import os
from collections.abc import Sequence

# Read when the library is loaded; since 1.29 its Linux builds send telemetry by default.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime

from unroll_engine.errors import RuntimeUnavailableError
from unroll_engine.kernel import read_onnx
from unroll_engine.models.spec import Float32Array, State
from unroll_engine.runtimes.base import ArrayResult, TickResult
from unroll_engine.runtimes.scan_graph import build_scan
from unroll_proto import bundle

onnxruntime.disable_telemetry_events()


def session_options() -> onnxruntime.SessionOptions:
    """Returns the options of the parity proof: one thread, so that no sum is split by load."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    return options


class _Session:
    """A graph with inputs values and state tensors, and outputs logits, states and state tensors, in this order."""

    def __init__(self, model: bytes, providers: Sequence[str | tuple[str, dict[str, str]]]) -> None:
        self.session = onnxruntime.InferenceSession(model, session_options(), providers=providers)
        self._inputs = [each.name for each in self.session.get_inputs()]

    def run(self, x: Float32Array, state: State) -> tuple[Float32Array, Float32Array, State]:
        """Runs the graph; `x` and the results are in its layout."""
        logits, states, *final = self.session.run(None, dict(zip(self._inputs, (x, *state), strict=True)))
        return logits, states, tuple(final)


class OnnxCpuRuntime:
    """Runs the Scan form of `model.onnx` on one core, with the same bits for a lane in any tick.

    Args:
        model: Content of `model.onnx`.

    Raises:
        UnsupportedNetworkError: the network has no such form.
    """

    name = "onnx"
    device = "cpu"
    artifact = bundle.ONNX_RNN
    bitwise = True
    variant = ""

    def __init__(self, model: bytes) -> None:
        self._session = _Session(build_scan(read_onnx(model)), ["CPUExecutionProvider"])

    def run(self, x: Float32Array, state: State) -> ArrayResult:
        """See Runtime.run."""
        return TickResult(*self._session.run(x, state))


class OnnxOperatorRuntime:
    """Runs `model.onnx` itself on one core, within the bound of the proof, not to the bit.

    Args:
        model: Content of `model.onnx`.
    """

    name = "onnx"
    device = "cpu"
    artifact = bundle.ONNX_RNN
    bitwise = False
    variant = ""

    def __init__(self, model: bytes) -> None:
        self._session = _Session(model, ["CPUExecutionProvider"])

    def run(self, x: Float32Array, state: State) -> ArrayResult:
        """See Runtime.run."""
        return _run_batch_major(self._session, x, state)


class OnnxCudaRuntime:
    """Runs `model.onnx` itself on cuDNN, within the bound of the proof, not to the bit.

    Args:
        model: Content of `model.onnx`.

    Raises:
        RuntimeUnavailableError: this onnxruntime has no CUDA provider, or there is no CUDA device.
    """

    name = "onnx"
    device = "cuda"
    artifact = bundle.ONNX_RNN
    bitwise = False
    variant = ""

    def __init__(self, model: bytes) -> None:
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise RuntimeUnavailableError("device cuda: this onnxruntime has no CUDA provider; install onnxruntime-gpu")
        # TF32 keeps 10 bits of the mantissa, far outside the tolerance that was proven.
        self._session = _Session(model, [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"])
        if "CUDAExecutionProvider" not in self._session.session.get_providers():
            raise RuntimeUnavailableError("device cuda: onnxruntime found no CUDA device that it can use")

    def run(self, x: Float32Array, state: State) -> ArrayResult:
        """See Runtime.run."""
        return _run_batch_major(self._session, x, state)


def _run_batch_major(session: _Session, x: Float32Array, state: State) -> ArrayResult:
    logits, states, final = session.run(np.ascontiguousarray(x.transpose(1, 0, 2)), state)
    return TickResult(logits.transpose(1, 0, 2), states.transpose(1, 0, 2), final)
