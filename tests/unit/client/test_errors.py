"""Errors: each status has its exception, with its details."""

import copy
import pickle
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from support.servicers import PartialServicer

import unroll_client
from unroll_client import FieldViolation, ServerDraining, Snapshot, Unavailable, UnrollError
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceServicer

Script = Callable[[PartialServicer], str]
OK, CANCELLED, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE
KINDS = [
    kind
    for kind in vars(unroll_client).values()
    if isinstance(kind, type) and issubclass(kind, UnrollError) and kind not in (UnrollError, ServerDraining)
]


def detailed(code: grpc.StatusCode) -> status_pb2.Status:
    status = status_pb2.Status(code=code.value[0], message="first line\nsecond line")
    violation = error_details_pb2.BadRequest.FieldViolation(field="lengths[3]", description="0 timesteps")
    status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=Duration(nanos=250_000_000)))
    status.details.add().Pack(error_details_pb2.DebugInfo(detail="not for us"))
    return status


class Failing(PartialServicer):
    """Ends calls and streams with a status."""

    def __init__(self, status: status_pb2.Status, details: bytes) -> None:
        self._status = status
        self._details = details

    async def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802
        context.set_trailing_metadata((("grpc-status-details-bin", self._details),))
        code = next(code for code in grpc.StatusCode if code.value[0] == self._status.code)
        await context.abort(code, self._status.message)

    async def Unroll(self, requests: AsyncIterator[pb.UnrollRequest], context: Any) -> Any:  # noqa: N802
        async for request in requests:
            yield pb.UnrollResponse(key=request.key, error=self._status)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code not in (OK, CANCELLED, UNAVAILABLE)])
def test_every_status(script: Script, code: grpc.StatusCode) -> None:
    status = detailed(code)
    address = script(Failing(status, status.SerializeToString()))
    with unroll_client.Client(address, timeout=2, reconnect_timeout=0) as client:
        for call in (client.models, lambda: client.unroll().snapshot()):
            with pytest.raises(UnrollError) as caught:
                call()
            error = caught.value
            kinds = [kind for kind in KINDS if kind.code is code]
            assert type(error) is (kinds[0] if kinds else UnrollError)
            assert error.code is code
            assert str(error) == error.message == "first line second line"
            assert error.fields == (FieldViolation("lengths[3]", "0 timesteps"),)
            assert error.retry_after == 0.25


def test_details_that_cannot_be_read_are_no_second_error(script: Script) -> None:
    broken = status_pb2.Status(code=code_pb2.NOT_FOUND)
    broken.details.add(type_url="type.googleapis.com/google.rpc.BadRequest", value=b"\xff")
    for data in (b"\xff\xff", broken.SerializeToString()):
        with unroll_client.Client(script(Failing(broken, data))) as client:
            with pytest.raises(unroll_client.NotFound, match=r"^NOT_FOUND$") as caught:
                client.models()
            assert caught.value.fields == ()


def test_errors_are_also_what_python_calls_them() -> None:
    assert issubclass(unroll_client.InvalidArgument, ValueError)
    assert issubclass(unroll_client.NotFound, LookupError)
    assert issubclass(unroll_client.DeadlineExceeded, TimeoutError)
    assert issubclass(Unavailable, ConnectionError)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_can_be_copied_and_pickled(kind: type[UnrollError]) -> None:
    error = kind("what", fields=[FieldViolation("a", "b")], retry_after=2.0)
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):  # noqa: S301 (our own bytes)
        assert type(again) is kind
        assert (str(again), again.code, again.fields, again.retry_after) == ("what", error.code, error.fields, 2.0)


def test_a_drained_sequence_can_be_copied_and_pickled() -> None:
    error = ServerDraining("leaving", Snapshot("jv", 1, "simple_rnn", 5, (b"\0\0\0\0",)))
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):  # noqa: S301 (our own bytes)
        assert (str(again), again.snapshot) == ("leaving", error.snapshot)


class Refusing(PartialServicer):
    """Refuses everything with details, and counts the calls."""

    def __init__(self) -> None:
        self.calls = 0

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
        self.calls += 1
        status = detailed(grpc.StatusCode.PERMISSION_DENIED)
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, status.message)
        raise AssertionError


def test_details_over_the_wire(script: Callable[[UnrollServiceServicer], str]) -> None:
    servicer = Refusing()
    with unroll_client.Client(script(servicer)) as client, pytest.raises(unroll_client.PermissionDenied) as caught:
        client.model("jv")
    assert caught.value.fields == (FieldViolation("lengths[3]", "0 timesteps"),)
    # Only errors that a retry can help are retried.
    assert servicer.calls == 1


class Cancelling(Refusing):
    """Cancels every second call, starting with the first, as a server's core does while it shuts down."""

    async def _cancel(self, context: Any) -> None:
        self.calls += 1
        if self.calls % 2:
            await context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")

    async def GetModel(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._cancel(context)
        return pb.GetModelResponse(model=pb.Model(name="jv", version=3))

    async def Advance(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._cancel(context)
        return pb.AdvanceResponse(step=7)


def test_what_a_server_cancels_is_tried_again_where_it_counts_once(
    script: Callable[[UnrollServiceServicer], str],
) -> None:
    servicer = Cancelling()
    with unroll_client.Client(script(servicer)) as client:
        assert client.model("jv").version == 3
        assert client.advance("s", [[1.0]], first_step=6).step == 7
        assert servicer.calls == 4
        with pytest.raises(Unavailable, match="the server has cancelled the call"):
            client.advance("s", [[1.0]])
        assert servicer.calls == 5
