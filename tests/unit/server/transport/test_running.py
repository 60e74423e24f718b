"""Coroutines that run without a task until they wait for anything but a job of the engine."""

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any

import pytest

pytest.importorskip("unroll_server.transport.native._http2", reason="the native transport is not compiled")
from unroll_engine.async_engine import JobEnd
from unroll_server import caller
from unroll_server.transport.native.running import Run

WHO: ContextVar[str] = ContextVar("who", default="nobody")


async def outside_of_tasks(call: Callable[[], object]) -> None:
    """Calls a function as the event loop does with the transport's and the engine's turns."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    loop.call_soon(call)
    loop.call_soon(done.set)
    await done.wait()


async def begun(coroutine: Coroutine[Any, Any, None]) -> Run:
    run = Run(coroutine, asyncio.get_running_loop())
    await outside_of_tasks(run.start)
    return run


async def end(job: JobEnd) -> None:
    await outside_of_tasks(lambda: job.end(None))


def other_tasks() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


async def test_jobs_resume_a_coroutine_at_once_and_without_a_task() -> None:
    loop, seen = asyncio.get_running_loop(), []
    jobs = [JobEnd(loop=loop), JobEnd(loop=loop)]

    async def call() -> None:
        WHO.set("caller")
        for job in jobs:
            await job
            seen.append(WHO.get())

    await begun(call())
    assert not other_tasks()
    await end(jobs[0])
    assert seen == ["caller"]
    await end(jobs[1])
    assert seen == ["caller", "caller"]
    assert WHO.get() == "nobody"


async def test_any_other_wait_continues_in_a_task() -> None:
    loop, seen = asyncio.get_running_loop(), []
    job, later, after = JobEnd(loop=loop), loop.create_future(), JobEnd(loop=loop)

    async def call() -> None:
        WHO.set("caller")
        await job
        seen.append(asyncio.current_task() is None)
        await later
        async with asyncio.timeout(60):
            await after
        seen.append(WHO.get() == "caller")

    await begun(call())
    await end(job)
    (task,) = other_tasks()
    later.set_result(None)
    after.end(None)
    await task
    assert seen == [True, True]


async def test_a_coroutine_can_ask_for_a_task() -> None:
    seen: list[bool] = []

    async def call() -> None:
        seen.append(asyncio.current_task() is None)
        for _ in range(2):
            await caller.in_task()
            seen.append(asyncio.current_task() is None)

    await begun(call())
    (task,) = other_tasks()
    await task
    assert seen == [True, False, False]


async def test_an_error_of_a_future_reaches_the_coroutine() -> None:
    later: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def call() -> None:
        with pytest.raises(ValueError, match="late"):
            await later

    await begun(call())
    (task,) = other_tasks()
    later.set_exception(ValueError("late"))
    await task


@pytest.mark.parametrize("in_task", [False, True])
async def test_cancelling_ends_the_coroutine_where_it_waits(in_task: bool) -> None:
    loop = asyncio.get_running_loop()
    awaited, cancelled = loop.create_future() if in_task else JobEnd(loop=loop), asyncio.Event()

    async def call() -> None:
        try:
            await awaited
        except asyncio.CancelledError:
            cancelled.set()
            raise

    run = await begun(call())
    assert bool(other_tasks()) is in_task
    run.cancel()
    await cancelled.wait()
    await asyncio.gather(*other_tasks(), return_exceptions=True)


async def test_cancelling_before_the_task_begins_ends_the_coroutine_where_it_waits() -> None:
    loop, seen = asyncio.get_running_loop(), []

    async def call() -> None:
        try:
            await caller.in_task()
        except asyncio.CancelledError:
            seen.append("cancelled")
            await loop.create_future()
        finally:
            seen.append("ended")

    run = Run(call(), loop)

    def start_and_cancel() -> None:
        run.start()
        run.cancel()
        assert seen == ["cancelled"]
        run.cancel()

    await outside_of_tasks(start_and_cancel)
    assert seen == ["cancelled", "ended"]
    await asyncio.gather(*other_tasks(), return_exceptions=True)


async def test_an_error_is_reported_and_leaves_the_engine_alone() -> None:
    loop, reported = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))
    job = JobEnd(loop=loop)

    async def call() -> None:
        await job
        raise ValueError("broken")

    await begun(call())
    await end(job)
    assert [type(error) for error in reported] == [ValueError]
