"""Errors as problem details (RFC 9457): one table from the statuses of gRPC to those of HTTP."""

import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import grpc
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from unroll_client import UnrollError

MEDIA_TYPE = "application/problem+json"

# As google.rpc.Code maps them.
STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
# Statuses of requests that the web process itself refuses.
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    405: grpc.StatusCode.UNIMPLEMENTED,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    421: grpc.StatusCode.INVALID_ARGUMENT,
    503: grpc.StatusCode.UNAVAILABLE,
}


class Problem(Exception):  # noqa: N818 (the term of RFC 9457)
    """A request that is answered by an error.

    Args:
        status: HTTP status.
        detail: One line.
        members: Further members of the answer, by name.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        members: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = dict(headers or {})
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"
        code = _CODES.get(status, grpc.StatusCode.INTERNAL).name
        # `error` is the member that clients of the Open Inference Protocol read.
        self.content = {
            "type": "about:blank",
            "title": _title(status),
            "status": status,
            "detail": detail,
            "code": code,
            "error": detail,
        } | dict(members or {})

    @classmethod
    def at(cls, field: str, problem: str) -> "Problem":
        """Makes the refusal of one field of a request."""
        return cls(400, f"{field}: {problem}", {"errors": [{"field": field, "detail": problem}]})

    @classmethod
    def of(cls, error: UnrollError) -> "Problem":
        """Converts a failed call."""
        status = STATUSES.get(error.code, 500)
        pause = error.retry_after
        if status == 429 and pause is None and not error.reason:
            status = 413  # Only a message that is too large has neither.
        members: dict[str, Any] = {"code": error.code.name}
        if error.reason:
            members["reason"] = error.reason
        if error.fields:
            members["errors"] = [{"field": each.field, "detail": each.description} for each in error.fields]
        if pause is not None:
            members["retry_after"] = pause
        # The header has whole seconds.
        headers = {} if pause is None else {"retry-after": str(math.ceil(pause))}
        return cls(status, error.message, members, headers)

    def response(self, request_id: str) -> Response:
        """Returns the answer."""
        content = json.dumps(self.content | {"request_id": request_id}, ensure_ascii=False)
        return Response(content, self.status, self.headers, MEDIA_TYPE)


def too_large(limit: int) -> Problem:
    """Makes the refusal of a body over the limit."""
    what = f"body: over {limit} bytes; send less in one request, or raise --max-body-bytes"
    return Problem(413, what, headers={"connection": "close"})


def _title(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Client Closed Request"  # 499


def answer(request: Request, error: Exception) -> Response:
    """Answers a request whose handler raised an error; handler of exceptions of Starlette."""
    match error:
        case Problem():
            problem = error
        case UnrollError():
            problem = Problem.of(error)
        case HTTPException():
            detail = f"{request.method} {request.url.path}: {error.detail.lower()}"
            problem = Problem(error.status_code, detail, headers=error.headers)
        case _:
            raise error
    return problem.response(request.state.request_id)
