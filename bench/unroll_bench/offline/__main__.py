"""Measures batch inference over a file on two cores, and checks that every way gives the same answers.

`python -m unroll_bench.offline` (`make bench-files`). The ways take turns. Each is a process (with a server, two), from
its start to its end. On a machine with other load, seconds of CPU tell more than the rate.
"""

import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any, NamedTuple

import click
import numpy as np
import pyarrow.parquet as pq

from unroll_bench.contest import machine, network
from unroll_bench.contest.contestants import MODEL
from unroll_bench.contest.network import TOLERANCE, WrongAnswerError
from unroll_bench.offline.drawn import sequences
from unroll_proto import cli
from unroll_proto.sequences import write_sequences

BUNDLE, SERVER, LOOP = "--bundle", "--server", "DataLoader"
RATE_BAR = 70_800
"""Sequences per second without a server: three times the 23,600 of the path with a server when the bar was set."""
LOOP_BAR = 4.0
"""Times the rate of the loop."""
MEMORY_BAR = 500
"""Peak MB of the process without a server."""
SETTINGS = ((64, 0, 2), (256, 0, 2), (256, 1, 1), (256, 2, 1))
"""Batch size and workers of the DataLoader, and threads of PyTorch; the best one counts."""
TRIAL_ROWS = 20_000
LOOP_ROWS = 200_000
"""Most rows that the loop classifies: it takes minutes for more."""


class Run(NamedTuple):
    """One run over the file."""

    rate: float
    """Sequences per second, from the start of the process to its end."""
    cpu: float
    """Seconds of CPU, of a server too."""
    memory: float
    """Largest resident size of the process, in MB."""


def run(words: list[str | Path], rows: int) -> Run:
    """Runs a command to its end.

    Raises:
        WrongAnswerError: it failed.
    """
    begin = time.perf_counter()
    memory = 0.0
    with tempfile.TemporaryFile() as errors:
        process = Popen(words, stdout=DEVNULL, stderr=errors)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            memory = max(memory, _peak(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        if process.returncode:
            errors.seek(0)
            raise WrongAnswerError(f"{Path(words[0]).name}: {errors.read().decode(errors='replace')[-300:]}")
    return Run(rows / seconds, ended[2].ru_utime + ended[2].ru_stime, memory)


def _peak(pid: int) -> float:
    """Returns the largest resident size of a process in MB; its resource usage would begin with that of its parent."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def with_server(models: Path, words: list[str | Path], rows: int) -> Run:
    """Runs a command with the address of a fresh server, whose CPU counts."""
    serve: list[str | Path] = [
        Path(sys.executable).with_name("unroll-serve"),
        "--models",
        models,
        "--listen",
        "127.0.0.1:0",
    ]
    server = Popen(serve, stdout=PIPE, stderr=PIPE, text=True)
    assert server.stdout is not None
    address = next(line.partition(" on ")[2].split()[0] for line in server.stdout if " on " in line)
    try:
        done = run([*words, "--server", address], rows)
    finally:
        server.send_signal(signal.SIGTERM)
        _, status, usage = os.wait4(server.pid, 0)
        server.returncode = os.waitstatus_to_exitcode(status)
        server.communicate()
    return done._replace(cpu=done.cpu + usage.ru_utime + usage.ru_stime)


def check(expected: Path, other: Path) -> None:
    """Compares the answers of two ways, the second of which may have classified the first rows only.

    Raises:
        WrongAnswerError: a row is missing, or a logit differs by more than TOLERANCE.
    """
    mine, theirs = (pq.read_table(path, columns=["id", "logits"]) for path in (expected, other))
    mine = mine.slice(0, len(theirs))
    order = np.argsort(theirs["id"].to_numpy().astype(np.int64))
    rows = [np.asarray(table["logits"].combine_chunks().flatten()).reshape(len(table), -1) for table in (mine, theirs)]
    if not np.abs(rows[0] - rows[1][order]).max() <= TOLERANCE:
        raise WrongAnswerError(f"{other.name}: other answers than {expected.name}")


def measure(folder: Path, rows: int, rounds: int) -> dict[str, Any]:
    """Runs every way in turns; returns settings and runs."""
    looped = min(rows, LOOP_ROWS)
    source, models = folder / "in.parquet", network.export(folder)
    write_sequences(source, sequences(rows))
    classify: list[str | Path] = [Path(sys.executable).with_name("unroll"), "classify", source, "-o"]
    loop: list[str | Path] = [sys.executable, "-m", "unroll_bench.offline.loop", source, folder / "loop.parquet"]
    trials = {}
    for setting in SETTINGS:
        words = [*loop, *map(str, setting), str(min(TRIAL_ROWS, rows))]
        trials[setting] = run(words, min(TRIAL_ROWS, rows)).rate
    best = max(trials, key=lambda setting: trials[setting])
    runs: dict[str, list[Run]] = {BUNDLE: [], SERVER: [], LOOP: []}
    for _ in range(rounds):
        runs[BUNDLE].append(run([*classify, folder / "bundle.parquet", "--bundle", models / MODEL], rows))
        runs[SERVER].append(with_server(models, [*classify, folder / "server.parquet"], rows))
        runs[LOOP].append(run([*loop, *map(str, best), str(looped)], looped))
    # Row groups may differ.
    if not pq.read_table(folder / "bundle.parquet").equals(pq.read_table(folder / "server.parquet")):
        raise WrongAnswerError("--bundle and --server: other bits")
    check(folder / "bundle.parquet", folder / "loop.parquet")
    return {
        "machine": machine.describe(machine.cores()),
        "rows": rows,
        "loop": {"rows": looped, "best": best, "trials": {str(key): round(trials[key]) for key in trials}},
        "runs": {name: [each._asdict() for each in done] for name, done in runs.items()},
    }


def _per_cpu(report: dict[str, Any], name: str) -> float:
    """Returns the sequences for each second of CPU."""
    rows = report["loop"]["rows"] if name == LOOP else report["rows"]
    return float(statistics.median(rows / each["cpu"] for each in report["runs"][name]))


@click.command()
@click.option("--rows", type=click.IntRange(min=1), default=1_000_000, show_default=True, help="Sequences of the file.")
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of each way.")
@click.option("--out", type=click.Path(path_type=Path), default="bench-report/files.json", show_default=True)
def command(rows: int, rounds: int, out: Path) -> None:
    """Classifies a Parquet file without a server, with one, and by a loop of PyTorch."""
    with tempfile.TemporaryDirectory(prefix="unroll-bench-") as folder:
        try:
            report = measure(Path(folder), rows, rounds)
        except WrongAnswerError as error:
            raise click.ClickException(str(error)) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    middle = {
        name: Run(*(statistics.median(each[field] for each in runs) for field in Run._fields))
        for name, runs in report["runs"].items()
    }
    for name, each in middle.items():
        click.echo(
            f"{name:<12} {each.rate:>9,.0f} sequences/s {each.cpu:>8.1f} s of CPU {each.memory:>6,.0f} MB at most"
        )
    click.echo(f"{LOOP}: {report['loop']['trials']} by batch size, workers, threads; the best counts")
    ours = middle[BUNDLE]
    for name in (SERVER, LOOP):
        cheaper = _per_cpu(report, BUNDLE) / _per_cpu(report, name)
        click.echo(
            f"{BUNDLE} / {name}: {ours.rate / middle[name].rate:.1f}x the rate, {cheaper:.1f}x for a second of CPU"
        )
    bars = {
        f"{RATE_BAR:,} sequences/s or more": ours.rate >= RATE_BAR,
        f"{LOOP_BAR:.0f}x the rate of {LOOP} or more": ours.rate >= LOOP_BAR * middle[LOOP].rate,
        f"{MEMORY_BAR} MB or less": ours.memory <= MEMORY_BAR,
    }
    for bar, met in bars.items():
        click.echo(f"{BUNDLE}: {bar}: {'met' if met else 'not met'}")


if __name__ == "__main__":
    cli.run("make bench-files", command, "unroll-bench")
