"""Messages for the contestants: the same sequences in each protocol. Answers are checked before any is timed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc.aio
import numpy as np

from unroll_bench.contest.contestants import MODEL
from unroll_bench.contest.network import TOLERANCE, WrongAnswerError, hold
from unroll_bench.contest.servers.afternoon import MAX_MESSAGE_BYTES
from unroll_bench.load import Call
from unroll_bench.load.requests import CLASSIFY, classify_request
from unroll_engine.models.spec import Float32Array
from unroll_proto.inference import service_pb2 as oip
from unroll_proto.v1 import unroll_pb2 as pb

MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
Group = Sequence[Float32Array]
"""The sequences of one request."""


@dataclass(frozen=True)
class Contestant:
    """A server, and the calls to send it in turn.

    Attributes:
        name: Its name in figures.
        address: HOST:PORT.
        calls: One for each group of sequences, with a check of its answers.
        sequences: Sequences of one call.
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


async def classifier(name: str, address: str, groups: Sequence[Group], expected: Sequence[Float32Array]) -> Contestant:
    """Sends everything once to a server of unroll.v1.

    Args:
        name: Its name in figures.
        address: HOST:PORT.
        groups: Sequences of each request.
        expected: Logits [sequences, classes] of each request. Every later answer must have the bits of the first one.

    Raises:
        WrongAnswerError: an answer differs from eager PyTorch's.
    """
    messages = [classify_request(group, MODEL) for group in groups]
    calls = []
    for known, message, answer in zip(expected, messages, await answers(address, CLASSIFY, messages), strict=True):
        response = pb.ClassifyResponse.FromString(answer)
        logits = np.frombuffer(response.logits, "<f4").reshape(len(known), -1)
        hold(name, logits, known)
        if list(response.label_indices) != logits.argmax(axis=1).tolist():
            raise WrongAnswerError(f"{name}: a label is not the most probable class")
        calls.append(Call(CLASSIFY, message, answer.__eq__))
    return Contestant(name, address, calls, len(groups[0]))


async def triton(name: str, address: str, groups: Sequence[Group], expected: Sequence[Float32Array]) -> Contestant:
    """Sends everything once to Triton by ModelInfer: sequences padded to the longest of their request, with lengths.

    Raises:
        WrongAnswerError: an answer differs from eager PyTorch's.
    """
    messages = [_infer_request(group).SerializeToString() for group in groups]
    calls = []
    for known, message, answer in zip(expected, messages, await answers(address, MODEL_INFER, messages), strict=True):
        raw = oip.ModelInferResponse.FromString(answer).raw_output_contents[0]
        hold(name, np.frombuffer(raw, "<f4").reshape(known.shape), known)
        if not answer.endswith(raw):
            raise WrongAnswerError(f"{name}: the answer does not end with its values")
        calls.append(Call(MODEL_INFER, message, _close_to(known)))
    return Contestant(name, address, calls, len(groups[0]))


def _close_to(expected: Float32Array) -> Callable[[bytes], bool]:
    """Returns a check of an answer's values, with a tolerance, since a dynamic batcher varies the padding."""
    flat, size = expected.ravel(), expected.nbytes

    def check(answer: bytes) -> bool:
        return bool(np.abs(np.frombuffer(answer[-size:], "<f4") - flat).max() <= TOLERANCE)

    return check


def _infer_request(group: Group) -> oip.ModelInferRequest:
    lengths = np.array([len(sequence) for sequence in group], np.int32)
    x = np.zeros((len(group), lengths.max(), group[0].shape[1]), np.float32)
    for row, sequence in zip(x, group, strict=True):
        row[: len(sequence)] = sequence
    request = oip.ModelInferRequest(model_name=MODEL, raw_input_contents=[x.tobytes(), lengths.tobytes()])
    request.inputs.add(name="input", datatype="FP32", shape=x.shape)
    request.inputs.add(name="lengths", datatype="INT32", shape=(len(group), 1))
    return request
