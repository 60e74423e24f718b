"""`unroll bench` against real servers: every kind of load, answers checked, figures that fit together."""

import json
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.processes import ServerProcess, run

from unroll_proto.sequences import Sequence, write_sequences

SHORT = ("--seconds", "0.5", "--warm-up", "0.1")


def bench(server: ServerProcess, *words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {"UNROLL_SERVER": server.address, "COLUMNS": "120"}
    done = run("unroll", "bench", *SHORT, *words, check=False, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def measured(server: ServerProcess, *words: str | Path) -> dict[str, Any]:
    out: dict[str, Any] = json.loads(bench(server, "--json", "-", *words).stdout)
    assert out["errors"] == {}
    assert out["wrong"] == 0
    assert out["calls"] > 0
    assert out["rates"]["calls"] == pytest.approx(out["calls"] / out["seconds"])
    latency = out["latency_ms"]
    ordered = [latency[name] for name in ("50", "90", "95", "99", "99.9", "max")]
    assert ordered[0] > 0
    assert ordered == sorted(ordered)
    assert out["model"]["name"] == "jv"
    return out


def test_closed(server: ServerProcess) -> None:
    out = measured(server, "--closed", "3", "--lengths", "7", "--batch", "5", "--connections", "2", "--seed", "4")
    assert out["mode"] == "closed"
    assert out["rates"]["sequences"] == pytest.approx(out["rates"]["calls"] * 5)
    assert out["rates"]["steps"] == pytest.approx(out["rates"]["calls"] * 35)
    assert out["settings"]["seed"] == 4
    # A request carries 35 steps of 12 float32.
    assert out["bytes_sent"] > out["calls"] * 35 * 12 * 4 * 0.9
    assert out["corrected"]["interval_ms"] == out["latency_ms"]["50"]
    assert out["corrected"]["latency_ms"]["max"] == out["latency_ms"]["max"]


def test_open(server: ServerProcess) -> None:
    out = measured(server, "--open", "50", "--seconds", "2", "--lengths", "normal:20,5")
    assert out["mode"] == "open"
    assert 60 < out["calls"] < 140
    assert "latency_ms" not in out["corrected"]


def test_file(server: ServerProcess, vowels: list[Sequence], tmp_path: Path) -> None:
    file = tmp_path / "vowels.parquet"
    write_sequences(file, vowels[:10])
    out = measured(server, "--file", file, "--batch", "4", "--closed", "2")
    steps = sum(len(sequence.values) for sequence in vowels[:10])
    assert out["rates"]["steps"] == pytest.approx(out["rates"]["calls"] * steps / 3)


@pytest.mark.parametrize("words", [("--streams", "2", "--sequences", "9"), ("--sequences", "20", "--cadence", "0.1")])
def test_streams(server: ServerProcess, words: tuple[str, ...]) -> None:
    out = measured(server, *words, "--chunk", "5", "--every", "2")
    assert out["mode"] == "streams"
    assert out["messages"] > 0
    assert out["rates"]["steps"] == pytest.approx(out["rates"]["calls"] * 5)
    assert ("interval_ms" in out["corrected"]) == ("--cadence" not in words)


def test_table_and_file(server: ServerProcess, tmp_path: Path) -> None:
    done = bench(server, "--json", tmp_path / "run.json")
    out = json.loads((tmp_path / "run.json").read_text())
    assert done.stderr == ""
    assert done.stdout.startswith(f"jv version 1 on {server.address}")
    assert f"{out['rates']['sequences']:,.0f}" in done.stdout
    assert "wrong answers  0" in done.stdout
    assert all(ord(letter) >= 32 or letter == "\n" for letter in done.stdout)  # no terminal, nothing that moves


def test_killed_server(bundle_root: Path, tmp_path: Path) -> None:
    """A server that dies in the middle: what was lost is said, and the exit code is 1."""
    with ServerProcess(bundle_root, tmp_path / "log") as server:
        idle = server.cpu_seconds()

        def kill() -> None:
            # It has computed for a while: the load is on.
            while server.cpu_seconds() < idle + 0.1:
                time.sleep(0.02)
            server.signal(signal.SIGKILL)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        done = bench(server, "--warm-up", "0", "--seconds", "4", "--json", tmp_path / "run.json", code=1)
        killer.join()
    out = json.loads((tmp_path / "run.json").read_text())
    assert any(reason.startswith("connect: ") for reason in out["errors"])
    assert out["calls"] > 0
    assert "errors" in done.stderr.splitlines()[-1]


def test_no_server() -> None:
    done = run("unroll", "bench", "--server", "127.0.0.1:1", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("unroll: no answer from 127.0.0.1:1")
