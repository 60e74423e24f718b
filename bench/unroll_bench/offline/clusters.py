"""Measures the examples for clusters over one worker and two, beside `unroll classify --bundle` on one core and two.

`python -m unroll_bench.offline.clusters`, in a checkout after `make cluster-examples`. The processes of a cluster that
schedule, read and write share the machine's cores with its workers. The ways take turns. A run of one sequence, before
each run, tells what the start takes; the rate is that of the time after.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq

from unroll_bench.contest import network
from unroll_bench.contest.contestants import MODEL
from unroll_bench.contest.network import WrongAnswerError
from unroll_bench.offline.drawn import sequences
from unroll_proto import cli
from unroll_proto.sequences import write_sequences

WAYS = ("classify", "dask", "ray", "spark")
WORKERS = (1, 2)
PARTS = 16
"""Files of the input, so that there is work for each worker until the end."""
FOREIGN = ("DASK_", "RAY_", "SPARK_", "PYTHONPATH")
"""Prefixes of variables by which an example would join another cluster or run other code."""


def run(way: str, workers: int, source: Path, target: Path, bundle: Path) -> float:
    """Runs one way over a folder of parts.

    Returns:
        Seconds from the start of its process to its end.

    Raises:
        WrongAnswerError: it failed, or rows are missing.
    """
    shutil.rmtree(target, ignore_errors=True)
    words: list[str | Path]
    if way == "classify":
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:workers]))
        unroll = Path(sys.executable).with_name("unroll")
        words = ["taskset", "-c", cores, unroll, "classify", source, "-o", target, "--bundle", bundle]
        env = dict(os.environ)
    else:
        example = [".venv-cluster/bin/python", f"examples/{way}_batch.py"]
        words = [*example, source, target, "--bundle", bundle, "--workers", str(workers)]
        env = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
    begin = time.perf_counter()
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise WrongAnswerError(f"{way}: {done.stderr[-300:]}")
    if rows_of(target) != rows_of(source):
        raise WrongAnswerError(f"{way}: {rows_of(target)} of {rows_of(source)} rows")
    return seconds


def rows_of(folder: Path) -> int:
    """Counts the rows of a folder of parts."""
    return sum(pq.read_metadata(path).num_rows for path in folder.glob("*.parquet"))


def measure(folder: Path, rows: int, rounds: int, ways: list[str]) -> dict[str, Any]:
    """Runs the ways in turns; returns the seconds of every run by way and workers."""
    bundle = network.export(folder) / MODEL
    many, one = folder / "many", folder / "one"
    many.mkdir()
    one.mkdir()
    drawn = sequences(rows)
    for part in range(PARTS):
        write_sequences(many / f"part-{part:02}.parquet", islice(drawn, -(-rows // PARTS)))
    write_sequences(one / "part-00.parquet", sequences(1))
    starts: defaultdict[str, list[float]] = defaultdict(list)
    runs: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for way in ways:
            for workers in WORKERS:
                key = f"{way} {workers}"
                starts[key].append(run(way, workers, one, folder / "out", bundle))
                runs[key].append(run(way, workers, many, folder / "out", bundle))
                click.echo(
                    f"{key}: {starts[key][-1]:.1f} s for one sequence, {runs[key][-1]:.1f} s for {rows}", err=True
                )
    return {"rows": rows, "starts": starts, "runs": runs}


def table(report: dict[str, Any]) -> list[str]:
    """Returns the lines of the table: the rates after the start, and their ratio, as medians of the rounds."""
    lines = [
        "| | start, s | 1 worker, sequences/s | 2 workers | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for way in dict.fromkeys(key.split()[0] for key in report["runs"]):
        rates = [
            [
                report["rows"] / (whole - start)
                for whole, start in zip(report["runs"][key], report["starts"][key], strict=True)
            ]
            for key in (f"{way} {workers}" for workers in WORKERS)
        ]
        start = statistics.median(report["starts"][f"{way} {WORKERS[-1]}"])
        ratio = statistics.median(two / one for one, two in zip(*rates, strict=True))
        one, two = map(statistics.median, rates)
        lines.append(f"| {way} | {start:.1f} | {one:,.0f} | {two:,.0f} | {ratio:.2f} |")
    return lines


@click.command()
@click.option(
    "--rows", type=click.IntRange(min=100_000), default=1_000_000, show_default=True, help="Sequences of the input."
)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each way.")
@click.option("--only", default=",".join(WAYS), show_default=True, help="Ways to measure.")
@click.option("--out", type=click.Path(path_type=Path), default="bench-report/clusters.json", show_default=True)
def command(rows: int, rounds: int, only: str, out: Path) -> None:
    """Measures the examples for clusters over one worker and two."""
    if not Path(".venv-cluster/done").exists():
        raise click.ClickException(
            "no .venv-cluster here: run `make cluster-examples` first, at the root of a checkout"
        )
    if unknown := set(only.split(",")) - set(WAYS):
        raise click.BadParameter(
            f"{', '.join(sorted(unknown))}: some of {', '.join(WAYS)} expected", param_hint="--only"
        )
    with tempfile.TemporaryDirectory(prefix="unroll-bench-") as folder:
        try:
            report = measure(Path(folder), rows, rounds, only.split(","))
        except WrongAnswerError as error:
            raise click.ClickException(str(error)) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    click.echo("\n".join(table(report)))


if __name__ == "__main__":
    cli.run("python -m unroll_bench.offline.clusters", command, "unroll-bench")
