"""Messages between a supervisor and its workers."""

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from support.processes import PATIENCE
from support.settings import SETTINGS

from unroll_server.errors import StartupError
from unroll_server.workers import supervisor
from unroll_server.workers.channel import FD, Channel, WorkerConfig


async def test_a_worker_s_configuration_arrives_as_it_was_sent() -> None:
    ours, theirs = socket.socketpair()
    supervisor, worker = await Channel.on(ours), await Channel.on(theirs)
    config = WorkerConfig(SETTINGS.replace(models=Path("/a\nb")), 3, Path("/folder"))
    supervisor.send(**config.to_message())
    supervisor.send(drain=True)
    worker.send(failed="--models: \n ü")
    message = await worker.receive()
    assert message is not None
    assert WorkerConfig.from_message(message) == config
    assert await worker.receive() == {"drain": True}
    assert await supervisor.receive() == {"failed": "--models: \n ü"}
    supervisor.close()
    assert await worker.receive() is None
    worker.send(serving="nobody listens")
    await worker.flush()
    worker.close()


WORKER = f"""#!{sys.executable}
import os, socket
channel = socket.socket(fileno=int(os.environ["{FD}"]))
channel.makefile().readline()
channel.sendall(b'{{"serving": "m/1"}}\\n')
channel.recv(1)
"""


async def test_a_worker_that_can_t_be_started_for_a_while_is_started_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the kernel, out of memory, kills a worker and has none for the next one."""
    monkeypatch.setattr(supervisor, "FIRST_DELAY", 0.01)
    program, away = tmp_path / "worker", tmp_path / "away"
    program.write_text(WORKER)
    program.chmod(0o700)
    worker = supervisor._Worker(WorkerConfig(SETTINGS, 0, tmp_path))
    worker._command = [str(program)]
    assert await worker.start() == "m/1"
    keeping = asyncio.create_task(worker.keep())
    try:
        async with asyncio.timeout(PATIENCE):
            program.rename(away)
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            while worker.restarts < 2:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
            assert worker.pid is None
            away.rename(program)
            while worker.pid is None:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await worker.kill()


async def test_what_can_t_be_started_at_all_says_so_in_one_line(tmp_path: Path) -> None:
    worker = supervisor._Worker(WorkerConfig(SETTINGS, 0, tmp_path))
    worker._command = [str(tmp_path / "none")]
    with pytest.raises(StartupError, match=r"^a worker can't be started: No such file or directory$"):
        await worker.start()
