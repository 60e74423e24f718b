"""Calls at exact moments on an event loop."""

import asyncio
from collections.abc import Callable, Iterator
from time import perf_counter

# Timers of the event loop are a millisecond coarse; nearer moments are awaited in a busy loop.
_COARSE = 0.0015
# Most calls at once before arrived data is read.
_AT_ONCE = 64


async def on_schedule(moments: Iterator[float], act: Callable[[float], None]) -> None:
    """Calls `act` with each moment, at that moment or as soon after it as possible.

    Args:
        moments: Ascending, in seconds of `time.perf_counter`.
        act: The function; it must not block.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    upcoming = next(moments, None)

    def tick() -> None:
        nonlocal upcoming
        if done.done():
            return
        now = perf_counter()
        try:
            for _ in range(_AT_ONCE):
                if upcoming is None:
                    done.set_result(None)
                    return
                if upcoming > now:
                    break
                act(upcoming)
                upcoming = next(moments, None)
        except Exception as error:
            done.set_exception(error)
            return
        gap = 0.0 if upcoming is None else upcoming - now
        if gap > 2 * _COARSE:
            loop.call_later(gap - _COARSE, tick)
        else:
            loop.call_soon(tick)

    tick()
    await done
