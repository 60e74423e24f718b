"""Parts common to every process of the server: logging, its limit of descriptors, its event loop, requests to stop."""

import asyncio
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Coroutine
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from unroll_server import caller
from unroll_server.stopping import SIGNALS

_log = logging.getLogger(__name__)

OTHERS = 200
"""Descriptors of a process, at most, that are no connections."""
IMPATIENT = 1.0
"""Seconds after the first signal from which another one ends the process at once.

One request can bring several signals: a service manager signals every process of a group, and a parent passes its own
on.
"""
_WORD = re.compile(r"[!#-<>-~]+")


def configure_logging(level: str, form: str = "text") -> None:
    """Logs to standard error.

    Args:
        level: What to log from on.
        form: "text", or "json" for an object a line.
    """
    handler = logging.StreamHandler()
    handler.addFilter(_is_no_race)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    if level != "debug":
        # Its core tells of its own doings, on standard error and past the form; it asks when it is imported.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def _is_no_race(record: logging.LogRecord) -> bool:
    """Leaves out what grpc.aio tells of an answer that its call's end overtook: the caller's deadline, say."""
    return not (record.exc_info and type(record.exc_info[1]).__name__ == "ExecuteBatchError")


def allow_descriptors(connections: int) -> None:
    """Lets this process, and those that it starts, hold as many descriptors as the system lets them.

    Args:
        connections: That there may be, each of which is a descriptor; it is logged where they are too many.
    """
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS says that there is no limit, and allows less.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft != resource.RLIM_INFINITY and soft < connections + OTHERS:
        _log.warning(
            "at most %d descriptors, too few for tuning.max_connections %d: raise ulimit -n", soft, connections
        )


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What a record says beside its message: whose call it belongs to, and what it was given as `extra={"fields": }`.

    Records are formatted in the task that made them.
    """
    fields = {"request_id": caller.request_id.get(), "identity": caller.identity.get()}
    return {name: value for name, value in fields.items() if value} | getattr(record, "fields", {})


class JsonFormatter(logging.Formatter):
    """A record as one line: a JSON object with time, level, logger, message, fields, and the trace of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        said = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        said |= _fields_of(record)
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


class TextFormatter(logging.Formatter):
    """A record as a line for people, the fields at its end, with the trace of an exception below it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s%(said)s")

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        record.said = "".join(f" {name}={_plain(value)}" for name, value in _fields_of(record).items())
        return super().format(record)


def _plain(value: Any) -> str:
    text = str(value)
    # A caller has a say in its names: none must look like a field or a line of its own.
    return text if _WORD.fullmatch(text) else json.dumps(text)


def run(serving: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine on a new event loop, and leaves the loop open.

    Closing the loop would restore the default action of signals while the process has yet to report its exit code, and
    would wait for the default executor's threads. The process must end by `stopping.end`.
    """
    asyncio.Runner().run(serving)


class Stop(asyncio.Event):
    """A request to stop. Until `drain_on_signals` is called, it ends the process at once, with exit code 0."""

    def __init__(self) -> None:
        super().__init__()
        self._drains = False
        self._first: float | None = None

    def set(self) -> None:
        """Makes the request."""
        if not self._drains:
            os._exit(0)
        super().set()

    def drain_on_signals(self) -> None:
        """Makes SIGTERM and SIGINT set this event from now on; called on the event loop.

        A signal that arrives `IMPATIENT` seconds or more after the first one ends the process at once, with exit code
        128 + its number. An earlier one belongs to the same request.
        """
        self._drains = True
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._received, number)

    def _received(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif now - self._first >= IMPATIENT:
            os._exit(128 + number)
        self.set()
