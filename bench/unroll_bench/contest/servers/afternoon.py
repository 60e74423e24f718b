"""The server that a user would write in an afternoon: grpc.aio, one library call per request, padded per request.

`python -m unroll_bench.contest.servers.afternoon FORM FILE` with FORM one of `onnx` (onnxruntime on the RNN operator,
model.onnx) and `torchscript` (model.ts). It answers the Classify of unroll.v1, so that one client asks all. It serves
on a free port of the loopback interface until SIGTERM or SIGINT, and prints the port.
"""

import asyncio
import signal
import sys
import warnings
from collections.abc import Callable

import grpc.aio
import numpy as np
import numpy.typing as npt

from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceServicer, add_UnrollServiceServicer_to_server

MAX_MESSAGE_BYTES = 16 * 2**20
Array = npt.NDArray[np.float32]
Forward = Callable[[Array], Array]
"""Function of [batch, time, features] that returns logits [batch, time, classes]."""


def onnx_forward(file: str) -> Forward:
    """Loads a graph into onnxruntime, one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    layers, _, hidden = session.get_inputs()[1].shape

    def forward(x: Array) -> Array:
        state = np.zeros((layers, len(x), hidden), np.float32)
        logits: Array = session.run(["logits"], {"input": x, "initial_state": state})[0]
        return logits

    return forward


def torchscript_forward(file: str) -> Forward:
    """Loads a module into PyTorch, one thread."""
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.* is deprecated", category=DeprecationWarning)
        module = torch.jit.load(file).eval()  # type: ignore[no-untyped-call]  # torch.jit has no types
    hidden = module.fc.weight.shape[1]

    def forward(x: Array) -> Array:
        with torch.inference_mode():
            logits: Array = module(torch.from_numpy(x), torch.zeros(1, len(x), hidden))[0].numpy()
            return logits

    return forward


class Afternoon(UnrollServiceServicer):
    """Implements Classify; the rest of the service is unimplemented.

    Args:
        forward: Computes logits.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    async def Classify(self, request: pb.ClassifyRequest, context: object) -> pb.ClassifyResponse:  # noqa: N802 (gRPC)
        """Pads the sequences to the longest, runs them, and reads the logits of each sequence's last step."""
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


async def serve(form: str, file: str) -> None:
    """Serves until a signal."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)])
    # Only the stubs declare the methods abstract; the class answers UNIMPLEMENTED for the others.
    service = Afternoon((onnx_forward if form == "onnx" else torchscript_forward)(file))  # type: ignore[abstract]
    add_UnrollServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"serving {form} on 127.0.0.1:{port}", flush=True)
    await stop.wait()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
