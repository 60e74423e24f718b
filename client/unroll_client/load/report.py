"""What a run says at its end, and while it goes on: JSON, a table, a line."""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from unroll_client.load.result import Result, Tally

PERCENTILES: Final = (50.0, 90.0, 95.0, 99.0, 99.9)
# Enough for a percentile of what happened lately, few enough to cost a running load nothing.
_RECENT = 1000


def summary(result: Result, work: Mapping[str, float], interval: float | None) -> dict[str, Any]:
    """Everything measured, ready for JSON.

    Args:
        result: The run.
        work: What one call stands for, by name, as {"sequences": 64, "steps": 1856}; rates of these are given, too.
        interval: Seconds between the calls of one caller, to correct by (`Result.corrected`); None where latencies
            count from the intended beginning and so are correct as they are.
    """
    out: dict[str, Any] = {
        "seconds": result.seconds,
        "calls": result.calls,
        "rates": {"calls": result.rate} | {name: result.rate * number for name, number in work.items()},
        "errors": dict(result.errors.most_common()),
        "wrong": result.wrong,
        "bytes_sent": result.bytes_sent,
        "bytes_received": result.bytes_received,
        "latency_ms": percentiles(result.latencies),
    }
    if result.messages:
        out["messages"] = result.messages
        out["rates"]["messages"] = result.messages / result.seconds
    if interval is None:
        out["corrected"] = {"by": "latencies count from when a call should have begun"}
    elif interval > 0:
        out["corrected"] = {
            "by": "calls left out while a caller waited are added, one each interval (HdrHistogram)",
            "interval_ms": interval * 1e3,
            "latency_ms": percentiles(result.corrected(interval)),
        }
    return out


def percentiles(latencies: NDArray[np.float64]) -> dict[str, float | None]:
    """Milliseconds by percentile ("50" to "99.9"), and "max" and "mean"; None where nothing was measured."""
    names = [f"{q:g}" for q in PERCENTILES]
    if not len(latencies):
        return dict.fromkeys([*names, "max", "mean"])
    values = np.percentile(latencies, PERCENTILES, method="higher") * 1e3
    return dict(zip(names, values.tolist(), strict=True)) | {
        "max": float(latencies.max()) * 1e3,
        "mean": float(latencies.mean()) * 1e3,
    }


def table(title: str, out: Mapping[str, Any]) -> Table:
    """What `summary` made, for people."""
    grid = Table(box=None, pad_edge=False, show_header=False, title=Text(title), title_justify="left")
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, rate in out["rates"].items():
        grid.add_row(f"{name}/s", f"{rate:,.1f}" if rate < 100 else f"{rate:,.0f}")
    grid.add_row("latency ms", _line(out["latency_ms"]))
    if "latency_ms" in out.get("corrected", {}):
        grid.add_row("corrected ms", _line(out["corrected"]["latency_ms"]))
    megabytes = [
        out[name] / out["seconds"] / 1e6 if out["seconds"] else 0.0 for name in ("bytes_sent", "bytes_received")
    ]
    grid.add_row("MB/s", "{:.1f} sent, {:.1f} received".format(*megabytes))
    grid.add_row("wrong answers", str(out["wrong"]), style="red" if out["wrong"] else "")
    for reason, number in out["errors"].items():
        grid.add_row("errors", Text(f"{number:,} x {reason}"), style="red")
    return grid


def _line(latencies: Mapping[str, float | None]) -> str:
    names = [f"{q:g}" for q in PERCENTILES]
    parts = [(f"p{name}", latencies[name]) for name in names] + [("max", latencies["max"])]
    return "  ".join(
        f"{name} {'-' if value is None else f'{value:.3g}' if value < 100 else f'{value:.0f}'}" for name, value in parts
    )


class LiveLine:
    """One line about a run in progress.

    Args:
        tally: What it looks at.
        seconds: Length of the measured window.
    """

    def __init__(self, tally: Tally, seconds: float) -> None:
        self._tally = tally
        self._seconds = seconds
        self._seen = 0
        self._at = -math.inf

    def text(self, now: float) -> Text:
        """How it goes: since the last call of this, and of the latest 1,000 calls."""
        tally = self._tally
        count = len(tally.latencies)
        rate = (count - self._seen) / (now - self._at)
        self._seen, self._at = count, now
        if now < tally.begin:
            return Text(f"warming up  {tally.in_flight:,} in flight  {tally.errors.total():,} errors")
        middle, tail = np.percentile(tally.latencies[-_RECENT:] or [math.nan], (50, 99)) * 1e3
        return Text(
            f"{min(now - tally.begin, self._seconds):.0f}/{self._seconds:g} s  {rate:,.0f}/s  "
            f"{tally.in_flight:,} in flight  p50 {middle:.3g} ms  p99 {tail:.3g} ms  "
            f"{tally.errors.total():,} errors  {tally.wrong:,} wrong",
            style="red" if tally.errors or tally.wrong else "",
        )
