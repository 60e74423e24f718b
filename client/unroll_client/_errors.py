"""Errors of calls, and their mapping from gRPC statuses.

UnrollError
├── InvalidArgument (ValueError)         the request is invalid; `fields` names the parts
├── NotFound (LookupError)               no such model or version
├── FailedPrecondition                   not in this state: a snapshot of another model, a gap in the steps
├── Aborted                              another writer has moved the session on
├── ResourceExhausted                    over a limit, or no room now; `retry_after` has the pause
├── DeadlineExceeded (TimeoutError)      no answer within the timeout
├── PermissionDenied, Unauthenticated    not allowed, or not known
├── Internal                             the server's fault
└── Unavailable (ConnectionError)        no server, or it went away
    └── ServerDraining                   it is shutting down and gave back the sequence: `snapshot`
"""

# ruff: noqa: N818 (the names are those of gRPC's statuses)
from __future__ import annotations

import copy
import re
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

if TYPE_CHECKING:
    from unroll_client._sessions import SessionSteps
    from unroll_proto.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A part of a request that can't be used, and why."""

    field: str
    description: str


class UnrollError(Exception):
    """A call failed.

    Attributes:
        code: gRPC status code.
        message: One line.
        fields: Parts of the request that are at fault, if known.
        retry_after: Seconds after which the server asks for a retry; None if it does not ask.
        reason: Machine-readable cause, such as "SESSION_EXPIRED"; may be empty.
        snapshot: Last known state of a sequence that failed with its server: `unroll(snapshot=...)` resumes from its
            step. None for other errors, and if the sequence must start over.
        advanced: Answer to the steps of an `advance` over the server's limits that were applied before it failed;
            None if none were.
    """

    snapshot: Snapshot | None = None
    advanced: SessionSteps | None = None
    code = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        fields: Listing[FieldViolation] = (),
        retry_after: float | None = None,
        reason: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.fields = tuple(fields)
        self.retry_after = retry_after
        self.reason = reason


class InvalidArgument(UnrollError, ValueError):
    """The request is invalid; `fields` names the parts at fault."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(UnrollError, LookupError):
    """The server has no such model, or not that version of it."""

    code = grpc.StatusCode.NOT_FOUND


class FailedPrecondition(UnrollError):
    """The request does not fit the state of the server or sequence, such as a snapshot of another model."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Aborted(UnrollError):
    """Another writer advanced the session first."""

    code = grpc.StatusCode.ABORTED


class ResourceExhausted(UnrollError):
    """A limit is exceeded, or the server has no room now."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class DeadlineExceeded(UnrollError, TimeoutError):
    """No answer came within the timeout."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class PermissionDenied(UnrollError):
    """The caller is known but not allowed to do this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Unauthenticated(UnrollError):
    """The server requires a valid token or certificate."""

    code = grpc.StatusCode.UNAUTHENTICATED


class Internal(UnrollError):
    """The server failed by its own fault."""

    code = grpc.StatusCode.INTERNAL


class Unavailable(UnrollError, ConnectionError):
    """No server is reachable, or it was lost; a retry can help."""

    code = grpc.StatusCode.UNAVAILABLE


class ServerDraining(Unavailable):
    """The server is shutting down and returned the sequence.

    Attributes:
        snapshot: State after the last answered step: `unroll(snapshot=...)` resumes from it on any server.
    """

    snapshot: Snapshot

    def __init__(self, message: str, snapshot: Snapshot) -> None:
        super().__init__(message)
        self.snapshot = snapshot

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.message, self.snapshot), self.__dict__


_BY_CODE: dict[grpc.StatusCode, type[UnrollError]] = {
    kind.code: kind
    for kind in (
        InvalidArgument,
        NotFound,
        FailedPrecondition,
        Aborted,
        ResourceExhausted,
        DeadlineExceeded,
        PermissionDenied,
        Unauthenticated,
        Internal,
        Unavailable,
    )
}
_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
# Start of a field, a description or a message about one sequence of a Classify request.
_SEQUENCE = re.compile(r"^((?:lengths|initial_states)\[|(?:values: )?values of sequence )(\d+)")
_DETAILS = "grpc-status-details-bin"
# Status that grpc.aio reports for a stream if a write fails before the true status has arrived.
_WRITE_FAILED = "Internal error from Core"
# Causes of a failed connection, by part of gRPC's message.
_HINTS = (
    ("WRONG_VERSION_NUMBER", "the server does not speak TLS there: connect without it, or start it with --tls-cert"),
    ("CERTIFICATE_VERIFY_FAILED", "the server's certificate is not trusted: give the authority that issued it"),
    ("Hostname Verification Check failed", "the server's certificate has another name: give it as server_name"),
    ("Failed parsing HTTP/2", "no gRPC server is there: an HTTP/1.1 one, such as the port of --metrics?"),
    ("http1.x server", "no gRPC server is there: an HTTP/1.1 one, such as the port of --metrics?"),
    (
        "Socket closed",
        "the server closed the connection at once: does it speak TLS, or has it reached max_connections?",
    ),
)


def from_rpc_error(error: grpc.aio.AioRpcError) -> UnrollError:
    """Converts a failed RPC, with the details of its trailing metadata, to an exception."""
    if error.code() is grpc.StatusCode.INTERNAL and error.details() == _WRITE_FAILED:
        return Unavailable("the connection broke off")
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS and isinstance(value, bytes):
            try:
                status.ParseFromString(value)
            except DecodeError:
                status.Clear()
    message = error.details() or ""
    if "connections to all backends failing" in message:
        message = "; ".join([message, *(hint for part, hint in _HINTS if part in message)][:2])
    return _make(error.code(), message, status)


def from_status(status: status_pb2.Status) -> UnrollError:
    """Converts a status that arrived within a stream to an exception."""
    return _make(_BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN), status.message, status)


def renumbered(error: UnrollError, numbers: Listing[int]) -> UnrollError:
    """Puts an error about one request of several in terms of the whole, where its sequences have these numbers."""

    def renumber(place: re.Match[str]) -> str:
        index = int(place[2])
        return f"{place[1]}{numbers[index]}" if index < len(numbers) else place[0]

    found = copy.copy(error)
    found.fields = tuple(
        FieldViolation(_SEQUENCE.sub(renumber, each.field), _SEQUENCE.sub(renumber, each.description))
        for each in error.fields
    )
    found.message = _SEQUENCE.sub(renumber, error.message)
    found.args = (found.message,)
    return found


def _make(code: grpc.StatusCode, message: str, status: status_pb2.Status) -> UnrollError:
    fields: list[FieldViolation] = []
    retry_after, reason = None, ""
    bad_request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        try:
            if detail.Unpack(bad_request):
                fields += [FieldViolation(each.field, each.description) for each in bad_request.field_violations]
            elif detail.Unpack(retry):
                retry_after = retry.retry_delay.ToTimedelta().total_seconds()
            elif detail.Unpack(info):
                reason = info.reason
        except DecodeError:
            continue
    kind = _BY_CODE.get(code, UnrollError)
    line = " ".join(message.split()) or code.name
    return kind(line, code=code, fields=fields, retry_after=retry_after, reason=reason)
