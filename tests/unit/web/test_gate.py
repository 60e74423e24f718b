"""The gate, without a network: slow bodies, failures of a route, request ids."""

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from unroll_client import AsyncClient
from unroll_web.context import Context
from unroll_web.gate import Gate
from unroll_web.settings import Settings


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body that it received."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": body})


async def fail(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("a secret of the process")


async def through(app: Any, *body: Message, headers: dict[str, str] | None = None, **limits: Any) -> list[Message]:
    """Sends a request through the gate; returns the messages of its answer. After `body` nothing comes."""
    context = Context(Settings(AsyncClient, **limits))
    waiting = list(body)
    sent: list[Message] = []

    async def receive() -> Message:
        if waiting:
            return waiting.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    pairs = [(name.encode(), value.encode()) for name, value in {"host": "a", **(headers or {})}.items()]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": pairs, "query_string": b""}
    await Gate(app, context)(scope, receive, send)
    await context.close()
    return sent


def piece(data: bytes, more: bool = True) -> Message:
    return {"type": "http.request", "body": data, "more_body": more}


def headers_of(answer: list[Message]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in answer[0]["headers"]}


async def test_a_body_that_stops_is_refused() -> None:
    answer = await through(echo, piece(b"{"), body_timeout=0.01)
    assert answer[0]["status"] == 408
    assert json.loads(answer[1]["body"])["detail"] == "body: nothing came for 0.01 s"


@pytest.mark.parametrize(("size", "status"), [(10, 200), (11, 413)])
async def test_a_body_has_its_limit_in_all_its_pieces(size: int, status: int) -> None:
    pieces = [piece(b"x") for _ in range(size - 1)]
    answer = await through(echo, *pieces, piece(b"x", more=False), max_body_bytes=10)
    assert answer[0]["status"] == status


async def test_a_failure_is_an_answer_that_says_nothing_of_it(caplog: pytest.LogCaptureFixture) -> None:
    answer = await through(fail, headers={"x-request-id": "seven"})
    assert (answer[0]["status"], headers_of(answer)["x-request-id"]) == (500, "seven")
    assert "content-security-policy" in headers_of(answer)
    assert b"secret" not in answer[1]["body"]
    assert "secret" in caplog.text
    assert "request_id=seven" in caplog.text


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "line\tend"])
async def test_a_request_id_that_can_t_be_passed_on_is_replaced(given: str) -> None:
    answer = await through(echo, piece(b"", more=False), headers={"x-request-id": given})
    assert headers_of(answer)["x-request-id"] not in ("", given)
