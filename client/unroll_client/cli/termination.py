"""SIGTERM as an exception, so that a command removes a half-written file."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

EXIT_CODE = 128 + signal.SIGTERM


@contextmanager
def terminable() -> Iterator[None]:
    """Raises SystemExit(EXIT_CODE) in the context when SIGTERM arrives; for the main thread only."""
    terminated = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise SystemExit(EXIT_CODE) from None
        # An exception raised in some callback could get lost there; the cancellation of the main task can't.
        loop.call_soon_threadsafe(_cancel_all, loop)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException:
        if terminated:
            click.echo("unroll: terminated", err=True)
            raise SystemExit(EXIT_CODE) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()
