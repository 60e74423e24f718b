"""Common parts of every process of the server: logging, the limit of descriptors, the event loop, requests to stop."""

import asyncio
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from unroll_server import caller
from unroll_server.stopping import SIGNALS

_log = logging.getLogger(__name__)

OTHER_DESCRIPTORS = 200
"""Most descriptors of a process that are not connections."""
FORCE_AFTER = 1.0
"""Seconds after the first signal from which a second one ends the process at once.

One request can cause several signals: a service manager signals every process of a group, and a parent forwards its
own.
"""
_WORD = re.compile(r"[!#-<>-~]+")


def configure_logging(level: str, form: str = "text") -> None:
    """Logs to standard error.

    Args:
        level: Lowest level to log.
        form: Format of a line: "text", or "json" for an object.
    """
    handler = logging.StreamHandler()
    handler.addFilter(_is_not_overtaken)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    if level != "debug":
        # gRPC's core logs to standard error in its own format. It reads this variable when it is imported.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def _is_not_overtaken(record: logging.LogRecord) -> bool:
    """Returns False for the failure that grpc.aio logs if a call ends before its answer, such as at its deadline."""
    return not (record.exc_info and type(record.exc_info[1]).__name__ == "ExecuteBatchError")


def allow_descriptors(connections: int) -> None:
    """Raises the limit of descriptors of this process, and of those that it starts, as far as the system allows.

    Args:
        connections: Most connections, a descriptor each; a warning is logged if the limit is too low for them.
    """
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS reports no limit and still refuses to raise it.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft != resource.RLIM_INFINITY and soft < connections + OTHER_DESCRIPTORS:
        _log.warning(
            "at most %d descriptors, too few for tuning.max_connections %d: raise ulimit -n", soft, connections
        )


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Returns the fields of a record: request id and identity of its call, and the dict of `extra={"fields": ...}`.

    Records are formatted in the task that made them.
    """
    call = caller.current.get()
    fields = {"request_id": call.request_id, "identity": call.identity}
    return {name: value for name, value in fields.items() if value} | getattr(record, "fields", {})


class JsonFormatter(logging.Formatter):
    """A record as one line: a JSON object with time, level, logger, message, fields, and the trace of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        line |= _fields_of(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """A record as a line for people, the fields at its end, with the trace of an exception below it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s%(fields_text)s")

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        record.fields_text = "".join(f" {name}={_quoted(value)}" for name, value in _fields_of(record).items())
        return super().format(record)


def _quoted(value: Any) -> str:
    text = str(value)
    # Callers choose some of the values; none may look like another field or line.
    return text if _WORD.fullmatch(text) else json.dumps(text)


def run(
    main: Coroutine[Any, Any, None], new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
) -> None:
    """Runs a coroutine on a new event loop, and leaves the loop open.

    Closing the loop would restore the default action of signals while the process has yet to report its exit code, and
    would wait for the default executor's threads. The process must end by `stopping.end`.
    """
    asyncio.Runner(loop_factory=new_event_loop).run(main)


def serving_event_loop() -> asyncio.AbstractEventLoop:
    """Creates the event loop of a serving process: uvloop's if it is installed.

    Not for a supervisor: uvloop holds the GIL from a fork until the child process executes its program.
    """
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.new_event_loop()
    return new_event_loop()


class Stop(asyncio.Event):
    """A request to drain this process, made by SIGTERM or SIGINT.

    Args:
        impatient: True if a signal that arrives `FORCE_AFTER` seconds or more after the first one ends the process at
            once, with exit code 128 + its number. An earlier one belongs to the same request.
    """

    def __init__(self, impatient: bool = True) -> None:
        super().__init__()
        self._impatient = impatient
        self._first: float | None = None

    def drain_on_signals(self) -> None:
        """Makes signals set this event from now on; called on the event loop."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._received, number)

    def _received(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif self._impatient and now - self._first >= FORCE_AFTER:
            os._exit(128 + number)
        self.set()
