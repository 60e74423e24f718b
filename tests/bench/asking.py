"""What contestants are asked: the same sequences to each in its own messages, answers checked before any is timed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc.aio
import numpy as np
from support.eager import TOLERANCE
from support.wire import classify_request

from bench.infer import MODEL, MODEL_INFER, ModelInferRequest, ModelInferResponse
from bench.servers.serving import MAX_MESSAGE_BYTES
from unroll_client.load import Call
from unroll_engine.models.spec import Float32Array
from unroll_proto.v1 import unroll_pb2 as pb

CLASSIFY = "/unroll.v1.UnrollService/Classify"
Group = Sequence[Float32Array]
"""The sequences of one request."""


class WrongAnswerError(Exception):
    """A contestant answered something else than eager PyTorch computes, or refused."""


@dataclass(frozen=True)
class Contestant:
    """A server, and the calls that it is asked in turn.

    Attributes:
        name: As figures name it.
        address: HOST:PORT.
        calls: One a group of sequences; each checks the answer it gets.
        sequences: In one call.
    """

    name: str
    address: str
    calls: Sequence[Call]
    sequences: int


async def answers(address: str, path: str, messages: Sequence[bytes]) -> list[bytes]:
    """Sends each message once, one after another, with grpcio's client.

    Raises:
        WrongAnswerError: a call failed.
    """
    limits = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    async with grpc.aio.insecure_channel(address, options=limits) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
        try:
            return [await call(message, timeout=30) for message in messages]
        except grpc.aio.AioRpcError as error:
            raise WrongAnswerError(f"{path}: {error.code().name}: {error.details()}") from None


async def classifier(
    name: str, address: str, network: str, groups: Sequence[Group], expected: Sequence[Float32Array]
) -> Contestant:
    """A server that speaks unroll.v1.

    Args:
        name: As figures name it.
        address: HOST:PORT.
        network: The model, of the same name in the server.
        groups: Sequences of each request.
        expected: Logits [sequences, classes] of each request. Every later answer must have the bits of the first one.

    Raises:
        WrongAnswerError: an answer is not what eager PyTorch computes.
    """
    messages = [classify_request(group, network).SerializeToString() for group in groups]
    calls = []
    answered = await answers(address, CLASSIFY, messages)
    for group, known, message, answer in zip(groups, expected, messages, answered, strict=True):
        response = pb.ClassifyResponse.FromString(answer)
        logits = np.frombuffer(response.logits, "<f4").reshape(len(group), -1)
        _hold(name, logits, known)
        if list(response.label_indices) != logits.argmax(axis=1).tolist():
            raise WrongAnswerError(f"{name}: a label is not the most probable class")
        calls.append(Call(CLASSIFY, message, answer.__eq__))
    return Contestant(name, address, calls, len(groups[0]))


async def echo(name: str, address: str, like: Contestant) -> Contestant:
    """An echo asked with the messages of another contestant, answering as many bytes as that one does."""
    size = len((await answers(like.address, like.calls[0].path, [like.calls[0].message]))[0])
    path = f"/bench.Echo/{size}"
    messages = [call.message for call in like.calls]
    for message, answer in zip(messages, await answers(address, path, messages), strict=True):
        if answer != message[:size]:
            raise WrongAnswerError(f"{name}: not what was sent")
    return Contestant(name, address, [Call(path, m, m[:size].__eq__) for m in messages], like.sequences)


async def triton(name: str, address: str, groups: Sequence[Group], expected: Sequence[Float32Array]) -> Contestant:
    """Triton, asked for the same by ModelInfer: sequences of a request padded to its longest, with their lengths.

    Raises:
        WrongAnswerError: an answer is not what eager PyTorch computes.
    """
    messages = [_infer_request(group).SerializeToString() for group in groups]
    calls = []
    for known, message, answer in zip(expected, messages, await answers(address, MODEL_INFER, messages), strict=True):
        raw = ModelInferResponse.FromString(answer).raw_output_contents[0]
        _hold(name, np.frombuffer(raw, "<f4").reshape(known.shape), known)
        if not answer.endswith(raw):
            raise WrongAnswerError(f"{name}: the answer does not end with its values")
        calls.append(Call(MODEL_INFER, message, _close_to(known)))
    return Contestant(name, address, calls, len(groups[0]))


def _hold(name: str, logits: Float32Array, expected: Float32Array) -> None:
    if logits.shape != expected.shape:
        raise WrongAnswerError(f"{name}: logits {logits.shape}, {expected.shape} expected")
    difference = float(np.abs(logits - expected).max())
    if not difference <= TOLERANCE:
        raise WrongAnswerError(f"{name}: {difference:.1e} away from eager PyTorch, {TOLERANCE:.0e} allowed")


def _close_to(expected: Float32Array) -> Callable[[bytes], bool]:
    """A check of the values at an answer's end: a dynamic batcher pads differently each time, so bits may differ."""
    flat, size = expected.ravel(), expected.nbytes

    def check(answer: bytes) -> bool:
        return bool(np.abs(np.frombuffer(answer[-size:], "<f4") - flat).max() <= TOLERANCE)

    return check


def _infer_request(group: Group) -> "ModelInferRequest":
    lengths = np.array([len(sequence) for sequence in group], np.int32)
    x = np.zeros((len(group), lengths.max(), group[0].shape[1]), np.float32)
    for row, sequence in zip(x, group, strict=True):
        row[: len(sequence)] = sequence
    request = ModelInferRequest(model_name=MODEL, raw_input_contents=[x.tobytes(), lengths.tobytes()])
    request.inputs.add(name="input", datatype="FP32", shape=x.shape)
    request.inputs.add(name="lengths", datatype="INT32", shape=(len(group), 1))
    return request
