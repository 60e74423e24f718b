"""The supervisor's handle of a worker, with programs instead of workers."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.processes import PATIENCE
from support.waiting import until

from unroll_server.errors import StartupError
from unroll_server.workers import worker_process
from unroll_server.workers.protocol import DRAINED, FAILED, REFUSED, UNDRAINED, Report
from unroll_server.workers.runtime_dir import RuntimeDir
from unroll_server.workers.worker_process import WorkerProcess

SERVES = Report(True, "m/1").encode()


def worker_that(tmp_path: Path, *lines: str) -> WorkerProcess:
    """Makes a worker that runs lines of Python."""
    program = tmp_path / "worker.py"
    program.write_text("\n".join(("import os, signal, sys, time", *lines)))
    return WorkerProcess(0, RuntimeDir(tmp_path), PATIENCE, [sys.executable, str(program)])


def report(raw: bytes) -> str:
    return f"os.write(1, {raw!r}); os.close(1)"


def wake(pid: int) -> None:
    """Writes a line to the standard input of a worker."""
    Path(f"/proc/{pid}/fd/0").write_text("\n")


@asynccontextmanager
async def kept(worker: WorkerProcess) -> AsyncIterator[None]:
    """Restarts the worker whenever it ends, within the context."""
    keeping = asyncio.create_task(worker.keep())
    try:
        async with asyncio.timeout(PATIENCE):
            yield
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await worker.kill()


@pytest.mark.parametrize("report", [Report(True, "a/1, b/2"), Report(False, "--models: \n ü")])
def test_a_report_arrives_as_it_was_sent(report: Report) -> None:
    assert Report.decode(report.encode()) == report


async def test_a_worker_that_can_t_be_started_for_a_while_is_started_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Covers a kernel that is out of memory: it kills a worker and can't start the next one."""
    monkeypatch.setattr(worker_process, "FIRST_DELAY", 0.01)
    program, away = tmp_path / "worker", tmp_path / "away"
    program.write_text(f"#!{sys.executable}\nimport os, sys\n{report(SERVES)}\nsys.stdin.read()\n")
    program.chmod(0o700)
    worker = WorkerProcess(0, RuntimeDir(tmp_path), PATIENCE, [str(program)])
    assert await worker.start() == "m/1"
    async with kept(worker):
        program.rename(away)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: worker.restarts >= 2)
        assert worker.pid is None
        away.rename(program)
        await until(lambda: worker.serves)


async def test_a_worker_that_can_t_be_started_at_all_is_reported_in_one_line(tmp_path: Path) -> None:
    worker = WorkerProcess(0, RuntimeDir(tmp_path), PATIENCE, [str(tmp_path / "none")])
    with pytest.raises(StartupError, match=r"^a worker can't be started: No such file or directory$"):
        await worker.start()


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([report(Report(False, "--models: none").encode()), "time.sleep(3600)"], "^--models: none$"),
        (["sys.exit(3)"], "^a worker ended while it started; its log has the cause$"),
    ],
)
async def test_a_worker_that_can_t_serve_says_why(tmp_path: Path, lines: list[str], problem: str) -> None:
    worker = worker_that(tmp_path, *lines)
    with pytest.raises(StartupError, match=problem):
        await worker.start()
    assert worker.pid is None
    assert await worker.drain()


async def test_a_worker_that_a_signal_ends_while_it_starts_is_started_again(tmp_path: Path) -> None:
    ends = "if not os.path.exists('was'): open('was', 'w').close(); os.kill(os.getpid(), signal.SIGTERM)"
    worker = worker_that(tmp_path, f"os.chdir({str(tmp_path)!r})", ends, report(SERVES), "sys.stdin.read()")
    assert await worker.start() == "m/1"
    await worker.kill()


@pytest.mark.parametrize(
    ("code", "drained"), [(UNDRAINED, False), (REFUSED, True), (FAILED, True), (-signal.SIGKILL, True)]
)
async def test_a_stop_while_a_crashed_worker_waits_counts_the_calls_that_a_drain_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int, drained: bool
) -> None:
    """A crash lost its calls before the stop; a drain by an outside signal may be part of the stop."""
    monkeypatch.setattr(worker_process, "FIRST_DELAY", 10 * PATIENCE)
    end = f"os._exit({code})" if code >= 0 else f"os.kill(os.getpid(), {-code})"
    worker = worker_that(tmp_path, report(SERVES), "sys.stdin.readline()", end)
    assert await worker.start() == "m/1"
    async with kept(worker):
        assert worker.pid is not None
        wake(worker.pid)
        await until(lambda: "starting it again" in caplog.text)
        assert await worker.drain() == drained


@pytest.mark.parametrize(("code", "drained"), [(DRAINED, True), (UNDRAINED, False), (FAILED, False)])
async def test_the_exit_code_of_a_worker_that_serves_tells_whether_it_drained(
    tmp_path: Path, code: int, drained: bool
) -> None:
    handle = f"signal.signal(signal.SIGTERM, lambda *_: os._exit({code}))"
    worker = worker_that(tmp_path, handle, report(SERVES), "signal.pause()")
    await worker.start()
    assert await worker.drain() == drained


async def test_a_worker_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "KILL_AFTER", -PATIENCE)
    handle = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    worker = worker_that(tmp_path, handle, report(SERVES), "time.sleep(3600)")
    await worker.start()
    assert not await worker.drain()
    assert worker.pid is None
