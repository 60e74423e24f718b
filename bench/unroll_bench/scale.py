"""Simulates 10^6 live streams and 10^9 sequences a day from figures that were measured on one core.

`python -m unroll_bench.scale` prints the tables of docs/scale.md. The steps of streams are simulated one by one: they
arrive at random, wait for the tick that runs, and the next tick takes all that wait, as the engine does.
"""

from typing import NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from unroll_proto import cli

DAY = 86_400.0
STREAMS = 1_000_000
SEQUENCES = 1_000_000_000
LOADS = (0.3, 0.5, 0.7, 0.85, 0.95, 1.05)
"""Shares of a core's measured rate."""
SIMULATED = 200_000
"""Steps of one simulation."""
PLANNED = 0.7
"""Share of a core's rate to plan for: what is left is for replicas that restart, and for peaks."""


class Figures(NamedTuple):
    """What was measured, on one core; see docs/performance.md and `make bench-files`."""

    steps: float = 90_000
    """Single steps of streams per second, one in each message."""
    unloaded: float = 0.000_1
    """Seconds of a step when nothing else is to be done."""
    bytes_open: int = 1_496
    """Bytes of an open sequence on the server between its steps."""
    sequences: float = 147_000
    """Sequences of 7 to 29 steps per second of CPU, Parquet to Parquet, without a server."""
    bytes_in: int = 873
    """Bytes of such a sequence in Parquet."""
    bytes_out: int = 81
    """Bytes of its answer in Parquet."""
    price: float = 0.04
    """Price of a core for an hour, in dollars."""


def latencies(load: float, figures: Figures, count: int = SIMULATED) -> NDArray[np.float64]:
    """Simulates the steps of one core.

    Args:
        load: Steps that arrive, as a share of the measured rate.
        figures: What was measured.
        count: Steps to simulate.

    Returns:
        Seconds from the arrival of each step to its answer, float64 [count].
    """
    arrivals = np.random.default_rng(0).exponential(1 / (load * figures.steps), count).cumsum()
    answered = np.empty(count)
    each = 1 / figures.steps
    first, free = 0, 0.0
    while first < count:
        begin = max(free, arrivals[first])
        last = max(int(np.searchsorted(arrivals, begin, side="right")), first + 1)
        # The fixed part of a tick is in the rate already, once ticks hold several steps.
        free = begin + max(figures.unloaded, (last - first) * each)
        answered[first:last] = free
        first = last
    waits: NDArray[np.float64] = answered - arrivals
    return waits


def streams(figures: Figures, cadence: float) -> list[str]:
    """Returns the lines about live streams with a step each `cadence` seconds."""
    rate = STREAMS / cadence
    lines = ["| load of a core | cores | p50 ms | p99 ms | a month |", "| --- | --- | --- | --- | --- |"]
    for load in LOADS:
        cores = int(np.ceil(rate / figures.steps / load))
        p50, p99 = (float(each) * 1e3 for each in np.percentile(latencies(load, figures), [50, 99]))
        cost = cores * figures.price * 24 * 30
        shown = (f"{p50:.2f}", f"{p99:.2f}") if load < 1 else ("grows", "grows")
        lines.append(f"| {load:.0%} | {cores} | {shown[0]} | {shown[1]} | ${cost:,.0f} |")
    cores = int(np.ceil(rate / figures.steps / PLANNED))
    on_each = STREAMS / cores
    lines += [
        "",
        " ".join(
            (
                f"State: {STREAMS * figures.bytes_open / 1e9:.1f} GB on the servers in all,",
                f"{on_each * figures.bytes_open / 1e6:.0f} MB a core, for {on_each:,.0f} streams each.",
                f"If one of {cores} replicas dies, its streams resume on the others in",
                f"{on_each / (cores - 1) / (figures.steps * (1 - PLANNED)):.2f} s of what they have to spare.",
            )
        ),
    ]
    return lines


def batches(figures: Figures) -> list[str]:
    """Returns the lines about sequences in files."""
    seconds = SEQUENCES / figures.sequences
    lines = ["| done in | cores | read MB/s | written MB/s | a day |", "| --- | --- | --- | --- | --- |"]
    for name, window in (("a day", DAY), ("an hour", 3600.0), ("ten minutes", 600.0)):
        cores = seconds / window
        read, written = (SEQUENCES * size / window / 1e6 for size in (figures.bytes_in, figures.bytes_out))
        cost = seconds / 3600 * figures.price
        lines.append(f"| {name} | {cores:.1f} | {read:,.0f} | {written:,.0f} | ${cost:.2f} |")
    read, written = (SEQUENCES * size / 1e12 for size in (figures.bytes_in, figures.bytes_out))
    lines += ["", f"{read:.2f} TB are read and {written:.2f} TB written."]
    return lines


@click.command()
@click.option("--steps", default=Figures().steps, show_default=True, help="Single steps of streams a second and core.")
@click.option("--unloaded", default=Figures().unloaded, show_default=True, help="Seconds of a step on an idle server.")
@click.option("--bytes-open", default=Figures().bytes_open, show_default=True, help="Bytes of an open sequence.")
@click.option("--sequences", default=Figures().sequences, show_default=True, help="Sequences of files a second of CPU.")
@click.option("--bytes-in", default=Figures().bytes_in, show_default=True, help="Bytes of a sequence in its file.")
@click.option("--bytes-out", default=Figures().bytes_out, show_default=True, help="Bytes of its answer.")
@click.option("--price", default=Figures().price, show_default=True, help="Dollars for a core and hour.")
@click.option("--cadence", default=1.0, show_default=True, help="Seconds between two steps of a stream.")
def command(cadence: float, **figures: float) -> None:
    """Simulates 10^6 live streams and 10^9 sequences a day."""
    measured = Figures(**figures)  # type: ignore[arg-type] # click makes the types of the defaults
    click.echo(f"{STREAMS:,} streams, a step each {cadence:g} s:\n")
    click.echo("\n".join(streams(measured, cadence)))
    click.echo(f"\n{SEQUENCES:,} sequences a day, from files:\n")
    click.echo("\n".join(batches(measured)))


if __name__ == "__main__":
    cli.run("python -m unroll_bench.scale", command, "unroll-bench")
