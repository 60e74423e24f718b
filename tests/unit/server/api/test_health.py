"""grpc.health.v1.Health: its answers, and watchers that do not read."""

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2 as pb

from unroll_server.api.health import Health
from unroll_server.errors import DrainingError

SERVING, NOT_SERVING = pb.HealthCheckResponse.SERVING, pb.HealthCheckResponse.NOT_SERVING
UNKNOWN = pb.HealthCheckResponse.SERVICE_UNKNOWN


class Caller:
    """The context of a call that keeps written messages, and accepts at most `room`."""

    def __init__(self, room: int = 100) -> None:
        self.statuses: asyncio.Queue[Any] = asyncio.Queue()
        self._room = asyncio.Semaphore(room)

    async def write(self, response: Any) -> None:
        await self._room.acquire()
        self.statuses.put_nowait(response.status)

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise grpc.aio.AbortError(code, details)

    async def expect(self, status: Any) -> None:
        async with asyncio.timeout(10):
            assert await self.statuses.get() == status


async def test_a_name_is_checked_and_listed_as_it_was_set() -> None:
    health = Health()
    assert (await health.Check(pb.HealthCheckRequest(), Caller())).status == NOT_SERVING
    health.set({"": True, "jv": True})
    health.set({"jv": False})
    assert (await health.Check(pb.HealthCheckRequest(service="jv"), Caller())).status == NOT_SERVING
    listed = await health.List(pb.HealthListRequest(), Caller())
    assert {name: each.status for name, each in listed.statuses.items()} == {"": SERVING, "jv": NOT_SERVING}
    with pytest.raises(grpc.aio.AbortError, match="NOT_FOUND"):
        await health.Check(pb.HealthCheckRequest(service="other"), Caller())


async def test_watchers_get_each_change_though_another_does_not_read() -> None:
    health = Health()
    unread, watcher, early = Caller(room=0), Caller(), Caller()
    unfinished, *watching = (
        asyncio.create_task(health.Watch(pb.HealthCheckRequest(service=name), caller))
        for name, caller in (("", unread), ("", watcher), ("jv", early))
    )
    await watcher.expect(NOT_SERVING)
    await early.expect(UNKNOWN)
    health.set({"": True, "jv": True})
    await watcher.expect(SERVING)
    await early.expect(SERVING)
    health.end()
    health.set({"": True})
    await watcher.expect(NOT_SERVING)
    await early.expect(NOT_SERVING)
    for call in watching:
        with pytest.raises(DrainingError):
            await call
    assert unread.statuses.empty()
    unfinished.cancel()
