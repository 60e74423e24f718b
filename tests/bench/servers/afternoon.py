"""The server that a user would write in an afternoon: grpc.aio, one call of a library per request, padded by request.

`python -m bench.servers.afternoon FORM FILE` with FORM one of `onnx` (onnxruntime on the RNN operator, model.onnx),
`torchscript` (model.ts) and `eager` (PyTorch on the weights; FILE is the network's name). It answers the Classify of
unroll.v1, so that one client asks all.
"""

import asyncio
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from bench.servers.serving import serve
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceServicer, add_UnrollServiceServicer_to_server

Array = npt.NDArray[np.float32]
Forward = Callable[[Array], Array]
"""[batch, time, features] -> logits [batch, time, classes]."""


def onnx_forward(file: Path) -> Forward:
    """onnxruntime, one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    layers, _, hidden = session.get_inputs()[1].shape

    def forward(x: Array) -> Array:
        state = np.zeros((layers, len(x), hidden), np.float32)
        logits: Array = session.run(["logits"], {"input": x, "initial_state": state})[0]
        return logits

    return forward


def torch_forward(unroll: Callable[..., tuple[object, ...]], hidden: int) -> Forward:
    """PyTorch, eager or TorchScript, one thread."""
    import torch

    torch.set_num_threads(1)

    def forward(x: Array) -> Array:
        with torch.inference_mode():
            logits = unroll(torch.from_numpy(x), torch.zeros(1, len(x), hidden))[0]
            assert isinstance(logits, torch.Tensor)
            return logits.numpy()

    return forward


def load(form: str, file: str) -> Forward:
    """What `form` says, on `file`."""
    if form == "onnx":
        return onnx_forward(Path(file))
    import torch

    if form == "eager":
        from bench.networks import network

        model = network(file)
        return torch_forward(model.unroll, model.fc.in_features)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.* is deprecated", category=DeprecationWarning)
        module = torch.jit.load(file).eval()  # type: ignore[no-untyped-call]  # torch.jit has no types
    return torch_forward(module, module.fc.weight.shape[1])


class Afternoon(UnrollServiceServicer):
    """Classify; the rest of the service is unimplemented.

    Args:
        forward: What computes.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    async def Classify(self, request: pb.ClassifyRequest, context: object) -> pb.ClassifyResponse:  # noqa: N802 (gRPC)
        """Pads to the longest of the request, runs it, reads each logits row at its sequence's last step."""
        lengths = np.array(request.lengths)
        values = np.frombuffer(request.values, np.float32)
        count, longest = len(lengths), int(lengths.max())
        if lengths.min() == longest:
            x = values.reshape(count, longest, -1)
        else:
            ragged = values.reshape(int(lengths.sum()), -1)
            x = np.zeros((count, longest, ragged.shape[1]), np.float32)
            x[np.arange(longest) < lengths[:, np.newaxis]] = ragged
        logits = self._forward(x)[np.arange(count), lengths - 1]
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        indices = logits.argmax(axis=1)
        return pb.ClassifyResponse(
            model=request.model,
            version=1,
            logits=logits.tobytes(),
            probabilities=probabilities.astype(np.float32).tobytes(),
            label_indices=indices.tolist(),
            labels=[f"class {index}" for index in indices],
        )


def main() -> None:
    """See the module."""
    form, file = sys.argv[1:]
    # The stubs call every method abstract; the class itself answers UNIMPLEMENTED for the others.
    service = Afternoon(load(form, file))  # type: ignore[abstract]
    asyncio.run(serve(form, partial(add_UnrollServiceServicer_to_server, service)))


if __name__ == "__main__":
    main()
