"""The native transport compared with grpcio's: the same status, details, metadata and messages."""

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import grpc
import grpc.aio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.processes import PATIENCE
from support.scripted_calls import CODES, MESSAGE_BYTES, PAIRS, Script, Side

STEP = 1.0
"""Seconds until a call that waits is over."""


class Outcome(NamedTuple):
    """Observations of both sides of a call."""

    code: grpc.StatusCode
    details: str
    messages: tuple[bytes, ...]
    trailers: Sequence[tuple[str, str | bytes]]
    seen: Sequence[tuple[str, str | bytes]]


async def outcome(side: Side, script: Script) -> Outcome:
    metadata = (("script", script.packed()), *script.metadata)
    options: Any = {
        "metadata": metadata,
        "compression": script.compression,
        "timeout": STEP if script.end == "deadline" else PATIENCE,
    }
    call: Any
    side.handlers.seen, messages = [], []
    try:
        method: Any
        if script.method in ("Unary", "None"):
            method = side.channel.unary_unary(f"/t/{script.method}")
            call = method(script.messages[0], **options)
        elif script.method == "Letters":
            method = side.channel.unary_stream("/t/Letters")
            call = method(script.messages[0], **options)
        else:
            call = side.channel.stream_stream("/t/Stream")(**options)
            for message in script.messages:
                await call.write(message)
            await call.done_writing()
        if script.end == "cancel":
            asyncio.get_running_loop().call_later(0.05, call.cancel)
        if script.method in ("Unary", "None"):
            messages.append(await call)
        else:
            messages += [message async for message in call]
    except (grpc.aio.AioRpcError, asyncio.CancelledError):
        pass
    trailers = sorted(await call.trailing_metadata() or (), key=repr) if script.end != "cancel" else []
    kept = tuple(messages) if script.end == "status" else ()
    return Outcome(await call.code(), await call.details(), kept, trailers, side.handlers.seen)


SIZES = st.sampled_from([0, 1, 5, 1000, 16_384, 65_535, MESSAGE_BYTES, MESSAGE_BYTES + 1])
MESSAGES = st.binary(max_size=20) | st.builds(lambda size, seed: bytes([seed]) * size, SIZES, st.integers(0, 255))


def up_to_too_large(messages: list[bytes]) -> tuple[bytes, ...]:
    """Cuts after a message that ends the call, which grpcio's client may report as its own error while it writes."""
    large = (index + 1 for index, message in enumerate(messages) if len(message) > MESSAGE_BYTES)
    return tuple(messages[: next(large, None)])


SCRIPTS = st.builds(
    Script,
    method=st.sampled_from(["Unary", "Stream", "Letters", "None"]),
    messages=st.lists(MESSAGES, min_size=1, max_size=4).map(up_to_too_large),
    metadata=PAIRS,
    compression=st.sampled_from(list(grpc.Compression)),
    answers=st.integers(0, 3),
    code=st.sampled_from(sorted(CODES)),
    details=st.text(max_size=40),
    trailers=PAIRS,
    end=st.sampled_from(["status"] * 12 + ["raise", "raise", "cancel"]),
    # A call that a large message ends may or may not end before its caller cancels it.
).filter(lambda script: script.end != "cancel" or max(map(len, script.messages)) <= MESSAGE_BYTES)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=SCRIPTS)
async def test_calls_end_alike(sides: list[Side], script: Script) -> None:
    native, grpcio = [await outcome(side, script) for side in sides]
    assert native == grpcio


@pytest.mark.parametrize("method", ["Unary", "Stream", "Letters"])
async def test_calls_that_wait_end_alike_at_their_deadline(sides: list[Side], method: str) -> None:
    script = Script(method, (b"x", b"y"), (), grpc.Compression.NoCompression, 1, 0, "", (), "deadline")
    # What the details say depends on who looks at the clock first, server or client.
    assert {(await outcome(side, script)).code for side in sides} == {grpc.StatusCode.DEADLINE_EXCEEDED}
