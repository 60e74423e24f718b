"""The description of the REST API in OpenAPI 3.1, from the table of its operations."""

import re
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from unroll_web.problems import MEDIA_TYPE
from unroll_web.rest.operations import BINARY, JSON, Operation
from unroll_web.rest.schemas import SCHEMAS

_ABOUT = """HTTP for an Unroll server. Every answer has the bits that gRPC gives.

Errors are problem details (RFC 9457). Each answer has the header `x-request-id`, that of the request if it has one."""


def describe(operations: Iterable[Operation]) -> dict[str, Any]:
    """Returns the OpenAPI document."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Unroll",
            "version": version("unroll-web"),
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"token": []}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "Token of an identity of the server."}
            },
            "responses": {
                "Problem": {
                    "description": "The request was refused, or failed.",
                    "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
                }
            },
        },
    }


def _operation(operation: Operation) -> dict[str, Any]:
    named = re.findall(r"{(\w+)}", operation.path)
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in named]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query]
    described: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": parameters,
        "responses": {"200": _answer(operation), "default": {"$ref": "#/components/responses/Problem"}},
    }
    if operation.body:
        media = (JSON, BINARY) if BINARY in operation.media else (JSON,)
        described["requestBody"] = {
            "required": not operation.body_optional,
            "content": {kind: _content(kind, operation.body) for kind in media},
        }
    return described


def _answer(operation: Operation) -> dict[str, Any]:
    if not operation.answer:
        plain = {"text/plain": {"schema": {"type": "string"}}}
        return {"description": "Yes."} | ({} if JSON in operation.media else {"content": plain})
    return {
        "description": operation.summary,
        "content": {kind: _content(kind, operation.answer) for kind in operation.media},
    }


def _content(kind: str, schema: str) -> dict[str, Any]:
    if kind == BINARY:
        what = f"JSON as {schema}, then the binary data of its tensors; the header has the length of the JSON."
        return {"schema": {"type": "string", "description": f"{what} Header: inference-header-content-length."}}
    return {"schema": {"$ref": f"#/components/schemas/{schema}"}}
