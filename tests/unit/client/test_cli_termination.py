"""SIGTERM ends a command that writes a file, without a partial file."""

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support.processes import BIN, PATIENCE
from unit.client.harness import MODEL, LocalServer

from unroll_client.cli.termination import EXIT_CODE, terminable
from unroll_proto.sequences import Sequence, write_sequences
from unroll_server.config import Limits

LIMITS = Limits(max_sequences=4096, max_steps=64, max_open_sequences=10, max_message_bytes=1 << 24)


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "out.csv"])
def test_a_classification_that_is_terminated_leaves_nothing(tmp_path: Path, name: str) -> None:
    source, folder = tmp_path / "sequences.parquet", tmp_path / "out"
    folder.mkdir()
    # The queue has no room for a batch of 1,024 of these, so the command waits for ever.
    write_sequences(source, [Sequence(str(index), np.ones((4, 3), np.float32)) for index in range(3000)])
    server = LocalServer(MODEL, limits=LIMITS, queued=100)
    command: list[str | Path] = [BIN / "unroll", "classify", source, "-o", folder / name, "--server", server.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (any(folder.iterdir()) and server.calls["Classify"]):
            os.sched_yield()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE)
    server.stop()
    assert (process.returncode, out, err) == (143, "", "unroll: terminated\n")
    assert list(folder.iterdir()) == []


def test_outside_of_an_event_loop(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, terminable():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == EXIT_CODE == 143
    assert capsys.readouterr().err == "unroll: terminated\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_done_or_fails_by_itself_is_left_alone() -> None:
    with terminable():
        pass
    with pytest.raises(KeyError), terminable():
        raise KeyError
