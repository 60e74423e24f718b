"""How ONNX Runtime runs a model here: the session options that the proof holds for."""

import os

# Read once, while the library loads; the call below covers what it starts later.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

onnxruntime.disable_telemetry_events()


def open_session(model: bytes) -> onnxruntime.InferenceSession:
    """Opens a serialized ONNX model on the CPU with the options that the bits promise was proven with.

    The server uses the same ones. Each of these can change bits and is left as it is here on purpose:

    - One intra-op thread: with more, a product is cut by the number of rows, so by the batch.
    - Prepacking stays on (the default): a constant right-hand matrix is packed once and every product, whatever its
      number of rows, takes the packed kernel. Without it, products of one row or one column take another kernel,
      which sums in another order.
    - Graph optimizations stay on (the default, all): the form that is fused is the one that was proven.

    Raises:
        Exception: ONNX Runtime can't read the model; it raises classes of its own without a public base.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
