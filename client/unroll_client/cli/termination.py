"""How SIGTERM ends a command that is writing a file: like any failure, so that nothing half done stays behind."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

EXIT_CODE = 128 + signal.SIGTERM


@contextmanager
def terminable() -> Iterator[None]:
    """Within it, SIGTERM raises SystemExit with EXIT_CODE where the work stands. For the main thread only."""
    told = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise SystemExit(EXIT_CODE) from None
        # An exception thrown into whichever callback runs could get lost there; that its tasks are cancelled can't.
        loop.call_soon_threadsafe(_cancel_all, loop)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException:
        if told:
            click.echo("unroll: terminated", err=True)
            raise SystemExit(EXIT_CODE) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()
