"""`unroll-bench` against real servers: every kind of load, answers checked, figures that fit together."""

import json
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.processes import ServerProcess, run

SHORT = ("--seconds", "0.5", "--warm-up", "0.1")


def bench(server: ServerProcess, *words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {"UNROLL_SERVER": server.address, "COLUMNS": "120"}
    done = run("unroll-bench", *SHORT, *words, check=False, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def measured(server: ServerProcess, *words: str | Path) -> dict[str, Any]:
    out: dict[str, Any] = json.loads(bench(server, "--json", *words).stdout)
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
    out = measured(server, "--closed", "3", "--lengths", "7", "--batch", "5", "--connections", "2")
    assert out["mode"] == "closed"
    assert out["rates"]["sequences"] == pytest.approx(out["rates"]["calls"] * 5)
    assert out["rates"]["steps"] == pytest.approx(out["rates"]["calls"] * 35)
    assert out["settings"]["batch"] == 5


def test_open(server: ServerProcess) -> None:
    out = measured(server, "--open", "50", "--seconds", "2", "--lengths", "15..25")
    assert out["mode"] == "open"
    assert 60 < out["calls"] < 140


@pytest.mark.parametrize("words", [("--streams", "2", "--sequences", "9"), ("--sequences", "20", "--cadence", "0.1")])
def test_streams(server: ServerProcess, words: tuple[str, ...]) -> None:
    out = measured(server, *words, "--chunk", "5")
    assert out["mode"] == "streams"
    assert out["messages"] > 0
    assert out["rates"]["steps"] == pytest.approx(out["rates"]["calls"] * 5)


def test_figures_for_people(server: ServerProcess) -> None:
    done = bench(server)
    assert done.stderr == ""
    first, *figures = done.stdout.splitlines()
    assert first.startswith("jv version 1 (")
    assert first.endswith(server.address)
    assert [line.split("  ")[0] for line in figures] == [
        "calls/s",
        "sequences/s",
        "steps/s",
        "latency ms",
        "wrong answers",
    ]


def test_killed_server(bundle_root: Path, tmp_path: Path) -> None:
    """A server that dies during the run: losses are reported, and the exit code is 1."""
    with ServerProcess(bundle_root, tmp_path / "log") as server:
        idle = server.cpu_seconds()

        def kill() -> None:
            # It has computed for a while, so the load is running.
            while server.cpu_seconds() < idle + 0.1:
                time.sleep(0.02)
            server.signal(signal.SIGKILL)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        done = bench(server, "--warm-up", "0", "--seconds", "4", "--json", code=1)
        killer.join()
    out = json.loads(done.stdout)
    assert any(reason.startswith("connect: ") for reason in out["errors"])
    assert out["calls"] > 0
    assert "errors" in done.stderr.splitlines()[-1]


def test_no_server() -> None:
    done = run("unroll-bench", "--server", "127.0.0.1:1", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("unroll-bench: no answer from 127.0.0.1:1")
