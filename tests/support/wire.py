"""The wire by generated code: makes requests and reads answers."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import grpc.aio
import numpy as np
from google.rpc import error_details_pb2, status_pb2
from numpy.typing import ArrayLike, NDArray

from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceStub

Array = NDArray[np.float32]


def to_bytes(values: ArrayLike) -> bytes:
    return np.asarray(values, "<f4").tobytes()


def to_array(raw: bytes, width: int) -> Array:
    return np.frombuffer(raw, "<f4").reshape(-1, width)


def classify_request(sequences: Sequence[Array], model: str = "jv", **more: Any) -> pb.ClassifyRequest:
    lengths = [len(sequence) for sequence in sequences]
    return pb.ClassifyRequest(model=model, lengths=lengths, values=to_bytes(np.concatenate(sequences)), **more)


def open_request(key: str, model: str = "jv", **more: Any) -> pb.UnrollRequest:
    opening = pb.OpenSequence(model=model, **{"return_states": True, "return_logits": True, **more})
    return pb.UnrollRequest(key=key, open=opening)


def chunk_request(key: str, first_step: int, values: ArrayLike) -> pb.UnrollRequest:
    return pb.UnrollRequest(key=key, chunk=pb.Chunk(first_step=first_step, values=to_bytes(values)))


def chunks_request(keys: Sequence[str], first_steps: Sequence[int], values: Iterable[ArrayLike]) -> pb.UnrollRequest:
    raws = [to_bytes(each) for each in values]
    return pb.UnrollRequest(chunks=pb.ChunkBatch(keys=keys, first_steps=first_steps, values=raws))


def snapshot_request(key: str) -> pb.UnrollRequest:
    return pb.UnrollRequest(key=key, take_snapshot=pb.TakeSnapshot())


def close_request(key: str) -> pb.UnrollRequest:
    return pb.UnrollRequest(key=key, close=pb.CloseSequence())


def details_of(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    """Returns the google.rpc.Status of an error."""
    trailers = dict(error.trailing_metadata() or ())
    return status_pb2.Status.FromString(cast(bytes, trailers["grpc-status-details-bin"]))


def violations_of(status: status_pb2.Status) -> list[tuple[str, str]]:
    """Returns field and description of every field violation."""
    found = []
    for detail in status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            found += [(violation.field, violation.description) for violation in bad.field_violations]
    return found


async def exchange(stub: Any, requests: Sequence[pb.UnrollRequest]) -> list[pb.UnrollResponse]:
    """Sends every request, half-closes, and reads every response."""
    call = stub.Unroll(iter(requests))
    return [response async for response in call]


def steps_of(responses: Sequence[pb.UnrollResponse], key: str) -> list[pb.Steps]:
    return [response.steps for response in responses if response.key == key and response.HasField("steps")]


def stub_of(channel: grpc.aio.Channel) -> UnrollServiceStub:
    return UnrollServiceStub(channel)
