"""`make bench`: runs rows of the table and writes their results. Exit code 1 if a row failed."""

import asyncio
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import click

from unroll_bench.contest import machine, table
from unroll_bench.contest.confine import pin
from unroll_bench.contest.contestants import TRITON
from unroll_bench.contest.figures import Outcome
from unroll_bench.contest.network import WrongAnswerError
from unroll_bench.contest.processes import StartError
from unroll_bench.contest.rows import ROWS
from unroll_bench.contest.rows.row import Row
from unroll_bench.contest.session import Session
from unroll_proto import cli

PEERS = {"triton": TRITON}


def _names(known: Collection[str]) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """Returns a parser of names, separated by commas."""

    def parse(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
        names = tuple(filter(None, map(str.strip, value.split(","))))
        if unknown := [name for name in names if name not in known]:
            raise click.BadParameter(f"{', '.join(unknown)}: not one of {', '.join(known)}", context, parameter)
        return names

    return parse


@click.command(context_settings={"show_default": True})
@click.option("--only", callback=_names([row.key for row in ROWS]), default="", help="Rows to run; all if empty.")
@click.option("--peers", callback=_names(PEERS), default="", help="Further contestants.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="Repeats of each measurement.")
@click.option("--seconds", type=click.FloatRange(min=0.2), default=0.8, help="Length of each measurement.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bench-report"),
    help="Report's folder.",
)
def command(only: tuple[str, ...], peers: tuple[str, ...], rounds: int, seconds: float, out: Path) -> None:
    """Measures all contestants, in turns, and compares the server with its bars."""
    rows = [row for row in ROWS if not only or row.key in only]
    out.mkdir(parents=True, exist_ok=True)
    cores = machine.cores()
    described = machine.describe(cores)
    click.echo(f"{described['cpu']}; cores: {described['cores']}")
    if not cores.apart:
        click.echo("One core only: client and server compete for it.")
    outcomes: list[Outcome] = []
    try:
        asyncio.run(_run(rows, cores, {PEERS[peer] for peer in peers}, rounds, seconds, outcomes))
    except (KeyboardInterrupt, asyncio.CancelledError):
        click.echo("interrupted")
    settings = {"rounds": rounds, "seconds": seconds, "peers": list(peers), "only": list(only)}
    table.write(out, described, settings, outcomes)
    click.echo(f"table.md and report.json are in {out}/")
    if len(outcomes) < len(rows):
        raise click.exceptions.Abort
    failed = [outcome.key for outcome in outcomes if outcome.problem]
    if failed:
        raise click.ClickException(f"could not be measured: {', '.join(failed)}")


async def _run(
    rows: Sequence[Row], cores: machine.Cores, peers: set[str], rounds: int, seconds: float, outcomes: list[Outcome]
) -> None:
    """Runs rows one after another; prints each outcome and adds it to `outcomes`."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    pin(cores.client)
    with tempfile.TemporaryDirectory(prefix="unroll-bench-") as folder:
        async with Session(Path(folder), cores, peers, rounds, seconds) as session:
            for row in rows:
                click.echo(f"{row.key}: {row.what}")
                outcome = Outcome(row.key, row.what)
                begin = time.perf_counter()
                try:
                    await row.measure(session, outcome)
                except (StartError, WrongAnswerError) as error:
                    outcome.problem = str(error)
                except Exception as error:  # The results of the other rows must not be lost.
                    traceback.print_exc()
                    outcome.problem = f"{type(error).__name__}: {error}"
                outcome.seconds = time.perf_counter() - begin
                outcomes.append(outcome)
                for line in table.lines(outcome):
                    click.echo(f"  {line}")


if __name__ == "__main__":
    cli.run("make bench", command, "unroll-bench")
