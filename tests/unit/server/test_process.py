"""Common parts of processes: logs as JSON and as text, and the limit of descriptors."""

import asyncio
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from contextvars import copy_context
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unroll_server import caller, process
from unroll_server.process import JsonFormatter, TextFormatter
from unroll_server.stopping import SIGNALS


def record(message: str, *arguments: object, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("a.b", logging.WARNING, __file__, 1, message, arguments, None)
    made.fields = fields
    return made


def of_a_call(formatter: logging.Formatter, made: logging.LogRecord) -> str:
    def format_it() -> str:
        call = caller.Call()
        call.request_id, call.identity = "7", "ann"
        caller.current.set(call)
        return formatter.format(made)

    return copy_context().run(format_it)


def test_json_has_the_message_the_call_and_the_fields() -> None:
    said = json.loads(of_a_call(JsonFormatter(), record("%d of %s", 3, "4", code="OK", steps=12)))
    assert datetime.fromisoformat(said.pop("time")).utcoffset() is not None
    assert said == {
        "level": "WARNING",
        "logger": "a.b",
        "message": "3 of 4",
        "request_id": "7",
        "identity": "ann",
        "code": "OK",
        "steps": 12,
    }


def test_json_of_no_call_has_no_empty_fields() -> None:
    assert set(json.loads(JsonFormatter().format(record("x")))) == {"time", "level", "logger", "message"}


def test_the_trace_of_an_exception_stays_on_the_line() -> None:
    try:
        raise ValueError("of\ntwo lines")
    except ValueError:
        made = logging.LogRecord("a", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    line = JsonFormatter().format(made)
    assert "\n" not in line
    assert "ValueError: of\ntwo lines" in json.loads(line)["exception"]
    assert TextFormatter().format(made).splitlines()[0].endswith("ERROR a: failed")


@given(st.text())
def test_json_is_one_line_of_any_text(text: str) -> None:
    line = JsonFormatter().format(record("%s", text, peer=text))
    assert len(line.splitlines()) == 1
    said = json.loads(line)
    assert (said["message"], said["peer"]) == (text, text)


def test_text_has_the_fields_at_its_end() -> None:
    line = of_a_call(TextFormatter(), record("call", code="OK", seconds=0.25))
    assert line.endswith(" WARNING a.b: call request_id=7 identity=ann code=OK seconds=0.25")


@given(st.text())
def test_what_a_caller_names_itself_looks_like_no_other_field_and_no_other_line(text: str) -> None:
    line = TextFormatter().format(record("call", identity=text, code="OK"))
    assert len(line.splitlines()) == 1
    _, _, said = line.partition(" identity=")
    if said.startswith('"'):
        value, end = json.JSONDecoder().raw_decode(said)
        assert said[end:] == " code=OK"
    else:
        value, rest = said.split(" ", 1)
        assert rest == "code=OK"
        assert "=" not in value
    assert value == text


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_a_message_with_a_percent_sign_is_taken_as_it_is(formatter: logging.Formatter) -> None:
    assert "100 %" in formatter.format(record("100 %"))


@pytest.mark.parametrize(("level", "verbosity"), [("info", "ERROR"), ("debug", None)])
def test_grpc_tells_of_its_own_doings_only_to_who_debugs(level: str, verbosity: str | None) -> None:
    program = "import os, sys; from unroll_server.process import configure_logging; configure_logging(sys.argv[1]);"
    program += "print(os.environ.get('GRPC_VERBOSITY'))"
    said = subprocess.run(
        [sys.executable, "-c", program, level],
        env={name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == str(verbosity)


@pytest.mark.parametrize(("connections", "warned"), [(10, False), (2**31, True)])
def test_a_process_may_hold_as_many_descriptors_as_the_system_lets_it(connections: int, warned: bool) -> None:
    program = """
import resource, sys
from unroll_server.process import allow_descriptors
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
allow_descriptors(int(sys.argv[1]))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    command = [sys.executable, "-c", program, str(connections)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(said.stdout) == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert ("tuning.max_connections" in said.stderr) == warned


async def test_a_worker_takes_every_signal_for_the_same_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "FORCE_AFTER", 0.0)
    stop = process.Stop(impatient=False)
    stop.drain_on_signals()
    try:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            await stop.wait()
            stop.clear()
    finally:
        for number in SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)
