"""`make bench`: runs rows of the table and writes what they gave. Exit code 1 if a row failed."""

import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

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


def _names(known: Sequence[str]) -> "click.ParamType[tuple[str, ...]]":
    """A list of names, separated by commas."""

    class Names(click.ParamType[tuple[str, ...]]):
        name = "names"

        def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
            names = tuple(name.strip() for name in str(value).split(",") if name.strip())
            unknown = [name for name in names if name not in known]
            if unknown:
                self.fail(f"{', '.join(unknown)}: not one of {', '.join(known)}", param, ctx)
            return names

    return Names()


@click.command(context_settings={"show_default": True})
@click.option("--only", type=_names([row.key for row in ROWS]), default="", help="Rows to run, all where empty.")
@click.option("--peers", type=_names(list(PEERS)), default="", help="Further contestants.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="Repeats of each measurement.")
@click.option("--seconds", type=click.FloatRange(min=0.2), default=0.8, help="Length of each measurement.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bench-report"),
    help="Report's folder.",
)
def command(only: tuple[str, ...], peers: tuple[str, ...], rounds: int, seconds: float, out: Path) -> None:
    """Measures every contestant, in turns, and holds the server against its bars."""
    rows = [row for row in ROWS if not only or row.key in only]
    console = Console(width=None if sys.stdout.isatty() else 150)
    out.mkdir(parents=True, exist_ok=True)
    cores = machine.cores()
    described = machine.describe(cores)
    console.print(f"{described['cpu']}; cores: {described['cores']}", highlight=False)
    if not cores.apart:
        console.print("[yellow]One core only: client and server get in each other's way.[/]")
    begin = time.perf_counter()
    outcomes: list[Outcome] = []
    try:
        asyncio.run(_run(rows, cores, {PEERS[peer] for peer in peers}, rounds, seconds, console, outcomes))
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("interrupted; what was measured until now:")
    settings = {"rounds": rounds, "seconds": seconds, "peers": list(peers), "only": list(only)}
    table.write(out, described, settings, outcomes)
    console.print(table.terminal(outcomes))
    console.print(f"{time.perf_counter() - begin:.0f} s; table.md and report.json are in {out}/", highlight=False)
    if len(outcomes) < len(rows):
        raise click.exceptions.Abort
    failed = [outcome.key for outcome in outcomes if outcome.problem]
    if failed:
        raise click.ClickException(f"could not be measured: {', '.join(failed)}")


async def _run(
    rows: Sequence[Row],
    cores: machine.Cores,
    peers: set[str],
    rounds: int,
    seconds: float,
    console: Console,
    outcomes: list[Outcome],
) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    pin(cores.client)
    with tempfile.TemporaryDirectory(prefix="unroll-bench-") as folder, console.status("") as status:
        current = ""

        def report(doing: str) -> None:
            status.update(f"{current}: {doing}")

        async with Session(Path(folder), cores, peers, rounds, seconds, report) as session:
            for row in rows:
                current = row.key
                outcome = Outcome(row.key, row.what)
                begin = time.perf_counter()
                try:
                    await row.measure(session, outcome)
                except (StartError, WrongAnswerError) as error:
                    outcome.problem = str(error)
                except Exception as error:  # what the other rows gave is not to be lost
                    console.print_exception()
                    outcome.problem = f"{type(error).__name__}: {error}"
                outcome.seconds = time.perf_counter() - begin
                outcomes.append(outcome)
                _tell(console, outcome)


def _tell(console: Console, outcome: Outcome) -> None:
    console.print(f"[bold]{outcome.key}[/]: {outcome.what} ({outcome.seconds:.0f} s)", highlight=False)
    for verdict in outcome.verdicts:
        console.print(f"  {verdict.claim}: {verdict.measured}; {verdict.asked}: {table.word(verdict)}", highlight=False)
    for note in outcome.notes:
        console.print(f"  [dim]{note}[/]", highlight=False)
    if outcome.problem:
        console.print(f"  [red]{outcome.problem}[/]", highlight=False)


if __name__ == "__main__":
    cli.run("make bench", command, "unroll-bench")
