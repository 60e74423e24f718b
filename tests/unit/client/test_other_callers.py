"""Clients for other callers on the same connections, and methods of other services."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from support.servicers import PartialServicer

from unroll_client import AsyncClient, NotFound, ResourceExhausted
from unroll_proto.v1 import unroll_pb2 as pb

GET_MODEL = "/unroll.v1.UnrollService/GetModel"


class Listener(PartialServicer):
    """Records the metadata of each call, and refuses GetModel for a minute."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.peers: set[str] = set()

    async def ListModels(self, request: Any, context: Any) -> pb.ListModelsResponse:  # noqa: N802
        self.heard.append(dict(context.invocation_metadata()))
        self.peers.add(context.peer())
        return pb.ListModelsResponse()

    async def GetModel(self, request: Any, context: Any) -> Any:  # noqa: N802
        status = status_pb2.Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=60)))
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")


async def test_another_caller_has_its_own_token_on_the_same_connection(script: Callable[..., str]) -> None:
    listener = Listener()
    own = [("authorization", "Bearer own"), ("x-a", "1"), ("x-b", "1")]
    async with AsyncClient(script(listener), metadata=own) as client:
        async with client.with_metadata([("authorization", "Bearer other"), ("x-b", "2")]) as other:
            await other.models()
        await client.models()
        with pytest.raises(ValueError, match="metadata: x-c: only printable ASCII"):
            client.with_metadata([("x-c", "\n")])
    assert [heard["authorization"] for heard in listener.heard] == ["Bearer other", "Bearer own"]
    assert [(heard["x-a"], heard["x-b"]) for heard in listener.heard] == [("1", "2"), ("1", "1")]
    assert len(listener.peers) == 1


async def test_a_refusal_is_raised_at_once_if_asked_for(script: Callable[..., str]) -> None:
    async with AsyncClient(script(Listener()), timeout=1000) as client:
        with pytest.raises(ResourceExhausted) as raised:
            await client.with_metadata([], retry_refused=False).model("m")
    assert raised.value.retry_after == 60


async def test_any_method_is_called_with_the_errors_of_the_library(address: str) -> None:
    async with AsyncClient(address) as client:
        names = [model.name for model in await client.models()]
        answer = await client.call(GET_MODEL, pb.GetModelRequest(model=names[0]), pb.GetModelResponse)
        assert answer.model.name == names[0]
        with pytest.raises(NotFound):
            await client.call(GET_MODEL, pb.GetModelRequest(model="nothing"), pb.GetModelResponse)
