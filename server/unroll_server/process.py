"""What every process of the server does alike: logging, and the signals that end it."""

import asyncio
import logging
import os
import signal


def configure_logging(level: str) -> None:
    """Logs to standard error, from `level` on."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def stop_signal() -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets, to be called on the event loop; a second one ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def received(number: signal.Signals) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, received, number)
    return stop
