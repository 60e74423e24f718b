"""Live figures of the server, from its Prometheus metrics."""

import asyncio
import re
import time
import urllib.error
import urllib.request
from typing import Any

_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})?\s+(\S+)")
_SUMS = (
    "unroll_steps_total",
    "unroll_ticks_total",
    "unroll_tick_lanes_sum",
    "unroll_tick_lanes_count",
    "unroll_tick_seconds_sum",
    "unroll_queue_seconds_sum",
    "unroll_queue_seconds_count",
    "unroll_queued_steps",
    "unroll_open_sequences",
    "unroll_workers",
    "process_resident_memory_bytes",
)
_MOST_BYTES = 4 * 2**20
_TIMEOUT = 5.0


async def read_figures(address: str) -> dict[str, Any]:
    """Reads the sums of the metrics that the page shows.

    Args:
        address: HOST:PORT of the server's metrics; empty if the command was given none.

    Returns:
        `figures` by name and the `time` in seconds; or `error`, the reason why there are none.
    """
    if not address:
        return {"error": "No figures: start both unroll-serve and unroll web with --metrics HOST:PORT."}
    url = f"http://{address}/metrics"
    try:
        text = await asyncio.to_thread(_fetch, url)
    except (OSError, ValueError, urllib.error.URLError) as error:
        return {"error": f"no figures from {url}: {error}"}
    return {"time": time.time(), "figures": _sums(text)}


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:  # noqa: S310 (always http)
        content: bytes = answer.read(_MOST_BYTES)
    return content.decode()


def _sums(text: str) -> dict[str, float]:
    sums = dict.fromkeys(_SUMS, 0.0)
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is None or match[1] not in sums or 'kind="computed"' in (match[2] or ""):
            continue
        sums[match[1]] += float(match[3])
    return sums
