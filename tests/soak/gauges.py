"""Resources of a server during the soak, and their release at its end."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.request import urlopen

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from support.processes import ServerProcess

INTERVAL = 1.0
"""Seconds between samples."""
PATIENCE = 60.0
"""Seconds within which an idle server must release its resources."""
STEADY = 5.0
"""Seconds without change before a run; the server counts its tasks every two."""
POOL = 6
"""Most threads of asyncio's pool, which it keeps."""
SLACK = 16 * 2**20
"""Bytes by which a server may grow while it warms up, besides `GROWTH`."""
GROWTH = 0.10
"""Share of its memory by which a server may grow from the second quarter of a run to the last."""
HELD = ("descriptors", "threads", "tasks", "queued", "sequences", "calls")
"""Fields of a sample that must return to their initial values."""
BUGS = ("Internal", "Unknown", "DataLoss")
"""Statuses that indicate bugs."""


@dataclass(frozen=True)
class Sample:
    """A sample of a server's resources.

    Attributes:
        seconds: Time of the sample.
        resident: Bytes of memory.
        descriptors: Open descriptors.
        threads: Threads of all its processes.
        tasks: Tasks of its event loops.
        queued: Timesteps and bytes admitted and not answered.
        sequences: Sequences open on streams.
        calls: Calls that have not ended.
        bugs: Calls that ended with one of `BUGS`.
    """

    seconds: float
    resident: int
    descriptors: int
    threads: int
    tasks: int
    queued: int
    sequences: int
    calls: int
    bugs: int

    @property
    def held(self) -> list[int]:
        """Values that must return to the initial ones."""
        return [getattr(self, name) for name in HELD]


def look(server: ServerProcess, metrics: str) -> Sample:
    """Samples all processes of a server.

    Args:
        server: The server.
        metrics: HOST:PORT of its metrics.
    """
    with urlopen(f"http://{metrics}/metrics", timeout=30) as answer:
        families = {each.name: each for each in text_string_to_metric_families(answer.read().decode())}

    def total(name: str, *codes: str) -> int:
        samples = families[name].samples if name in families else []
        counted = [each for each in samples if each.name in {name, f"{name}_total"}]
        return int(sum(each.value for each in counted if not codes or each.labels["grpc_code"] in codes))

    family = server.family()
    return Sample(
        time.monotonic(),
        sum(each.resident for each in family),
        sum(each.descriptors for each in family),
        sum(each.threads for each in family),
        total("unroll_event_loop_tasks"),
        total("unroll_queued_steps") + total("unroll_queued_bytes"),
        total("unroll_open_sequences"),
        total("grpc_server_started") - total("grpc_server_handled"),
        total("grpc_server_handled", *BUGS),
    )


async def watch(samples: list[Sample], looking: Callable[[], Sample]) -> None:
    """Samples repeatedly until cancelled."""
    while True:
        samples.append(await asyncio.to_thread(looking))
        await asyncio.sleep(INTERVAL)


async def steady(looking: Callable[[], Sample]) -> Sample:
    """Waits until a new server's resources are stable; returns the last sample."""
    since = now = await asyncio.to_thread(looking)
    while now.seconds - since.seconds < STEADY:
        await asyncio.sleep(INTERVAL / 4)
        now = await asyncio.to_thread(looking)
        if now.held != since.held:
            since = now
    return now


def let_go(start: Sample, end: Sample) -> bool:
    """Returns True if an idle server holds no more than at its start."""
    more = zip(HELD, start.held, end.held, strict=True)
    return all(after <= before + (POOL if name == "threads" else 0) for name, before, after in more)


async def settled(start: Sample, looking: Callable[[], Sample]) -> Sample:
    """Waits until the server holds no more than at `start`, or a timeout; returns the last sample."""
    until = time.monotonic() + PATIENCE
    while True:
        now = await asyncio.to_thread(looking)
        if let_go(start, now) or now.seconds > until:
            return now
        await asyncio.sleep(INTERVAL / 4)


def growth(samples: list[Sample]) -> tuple[float, bool]:
    """Returns the slope of memory in MiB per hour, from the second quarter of the run on, and True if it is bounded."""
    late = samples[len(samples) // 4 :]
    seconds = np.array([sample.seconds for sample in late])
    resident = np.array([sample.resident for sample in late], float)
    slope = float(np.polyfit(seconds - seconds[0], resident, 1)[0]) if len(late) > 1 else 0.0
    third = max(len(late) // 3, 1)
    before, after = np.median(resident[:third]), np.median(resident[-third:])
    return slope * 3600 / 2**20, bool(after <= before * (1 + GROWTH) + SLACK)
