"""gRPC statuses of the domain errors, with their details."""

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from unroll_engine.errors import (
    ExpiredError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    SequenceStateError,
)
from unroll_server.errors import (
    DrainingError,
    ForbiddenError,
    ModelRefusedError,
    NotOfferedError,
    SessionExpiredError,
    SessionNotFoundError,
    SessionRoomError,
    SessionStoreError,
    SessionTakenError,
    UnauthenticatedError,
)

STATUS = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    ModelNotFoundError: grpc.StatusCode.NOT_FOUND,
    ModelRefusedError: grpc.StatusCode.FAILED_PRECONDITION,
    SequenceStateError: grpc.StatusCode.FAILED_PRECONDITION,
    ExpiredError: grpc.StatusCode.DEADLINE_EXCEEDED,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DrainingError: grpc.StatusCode.UNAVAILABLE,
    InternalError: grpc.StatusCode.INTERNAL,
    NotOfferedError: grpc.StatusCode.UNIMPLEMENTED,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    ForbiddenError: grpc.StatusCode.PERMISSION_DENIED,
    SessionNotFoundError: grpc.StatusCode.NOT_FOUND,
    SessionExpiredError: grpc.StatusCode.NOT_FOUND,
    SessionTakenError: grpc.StatusCode.ABORTED,
    SessionRoomError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    SessionStoreError: grpc.StatusCode.UNAVAILABLE,
}
"""Status code of each domain error; docs/api.md explains them."""

DOMAIN = "unroll"
"""Domain of the reasons in google.rpc.ErrorInfo."""
DETAILS = "grpc-status-details-bin"
"""Trailer that carries the google.rpc.Status of a call."""
PUSHBACK = "grpc-retry-pushback-ms"
"""Trailer that tells a client when to retry."""


def status_of(error: RequestError) -> status_pb2.Status:
    """Returns the status of an error. Its details name the field at fault, the reason, and when to retry."""
    details: list[Message] = []
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.description)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.reason:
        details.append(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN))
    if isinstance(error, OverloadedError):
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_after * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=STATUS[type(error)].value[0], message=str(error))
    for detail in details:
        status.details.add().Pack(detail)
    return status
