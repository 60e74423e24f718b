"""Reports of a load run: JSON, and lines for people."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from unroll_bench.load.result import Result

PERCENTILES: Final = (50.0, 90.0, 95.0, 99.0, 99.9)


def summary(result: Result, work: Mapping[str, float]) -> dict[str, Any]:
    """Returns all results, ready for JSON.

    Args:
        result: The run.
        work: Average content of a call by name, as {"sequences": 64, "steps": 1856}; their rates are added.
    """
    out: dict[str, Any] = {
        "seconds": result.seconds,
        "calls": result.calls,
        "rates": {"calls": result.rate} | {name: result.rate * number for name, number in work.items()},
        "errors": dict(result.errors.most_common()),
        "wrong": result.wrong,
        "latency_ms": percentiles(result.latencies),
    }
    if result.messages:
        out["messages"] = result.messages
        out["rates"]["messages"] = result.messages / result.seconds
    return out


def percentiles(latencies: NDArray[np.float64]) -> dict[str, float | None]:
    """Returns milliseconds by percentile ("50" to "99.9"), "max" and "mean"; None if nothing was measured."""
    names = [f"{q:g}" for q in PERCENTILES]
    if not len(latencies):
        return dict.fromkeys([*names, "max", "mean"])
    values = np.percentile(latencies, PERCENTILES, method="higher") * 1e3
    return dict(zip(names, values.tolist(), strict=True)) | {
        "max": float(latencies.max()) * 1e3,
        "mean": float(latencies.mean()) * 1e3,
    }


def lines(out: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line for each figure of `summary`."""
    for name, rate in out["rates"].items():
        yield f"{name + '/s':<14} {rate:,.1f}" if rate < 100 else f"{name + '/s':<14} {rate:,.0f}"
    latencies = out["latency_ms"]
    shown = [(f"p{q:g}", latencies[f"{q:g}"]) for q in PERCENTILES] + [("max", latencies["max"])]
    yield f"{'latency ms':<14} {'  '.join(f'{name} {_three_digits(value)}' for name, value in shown)}"
    yield f"{'wrong answers':<14} {out['wrong']}"
    for reason, number in out["errors"].items():
        yield f"{'errors':<14} {number:,} x {reason}"


def _three_digits(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
