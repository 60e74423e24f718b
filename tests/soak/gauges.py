"""Memory, descriptors, threads and tasks of a server over the time of the soak, and whether they come back."""

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
"""Seconds that a server without callers has to let go of what it held."""
SLACK = 16 * 2**20
"""Bytes that a server may grow by while it warms up, beside `GROWTH`."""
GROWTH = 0.10
"""How much of its memory a server may gain from the second quarter of a run to the last."""
TASKS = "unroll_event_loop_tasks"


@dataclass(frozen=True)
class Sample:
    """One look at a server: bytes resident, open descriptors, threads, tasks of its event loops."""

    seconds: float
    resident: int
    descriptors: int
    threads: int
    tasks: int

    @property
    def held(self) -> tuple[int, int, int]:
        """What must come back to where it began."""
        return self.descriptors, self.threads, self.tasks


def look(server: ServerProcess, metrics: str) -> Sample:
    """Looks at all processes of a server.

    Args:
        server: The server.
        metrics: HOST:PORT of its metrics.
    """
    family = server.family()
    with urlopen(f"http://{metrics}/metrics", timeout=30) as answer:
        families = {each.name: each for each in text_string_to_metric_families(answer.read().decode())}
    return Sample(
        time.monotonic(),
        sum(each.resident for each in family),
        sum(each.descriptors for each in family),
        sum(each.threads for each in family),
        int(sum(sample.value for sample in families[TASKS].samples)),
    )


async def watch(samples: list[Sample], looking: Callable[[], Sample]) -> None:
    """Takes a sample again and again, until cancelled."""
    while True:
        samples.append(await asyncio.to_thread(looking))
        await asyncio.sleep(INTERVAL)


async def settled(start: Sample, looking: Callable[[], Sample]) -> Sample:
    """Waits until the server holds no more than at `start`, or its patience is over; the last sample."""
    until = time.monotonic() + PATIENCE
    while True:
        now = await asyncio.to_thread(looking)
        if all(after <= before for after, before in zip(now.held, start.held, strict=True)) or now.seconds > until:
            return now
        await asyncio.sleep(INTERVAL / 4)


def growth(samples: list[Sample]) -> tuple[float, bool]:
    """The slope of memory in MiB an hour, from the second quarter of the run on, and whether it is bounded."""
    late = samples[len(samples) // 4 :]
    seconds = np.array([sample.seconds for sample in late])
    resident = np.array([sample.resident for sample in late], float)
    slope = float(np.polyfit(seconds - seconds[0], resident, 1)[0]) if len(late) > 1 else 0.0
    third = max(len(late) // 3, 1)
    before, after = np.median(resident[:third]), np.median(resident[-third:])
    return slope * 3600 / 2**20, bool(after <= before * (1 + GROWTH) + SLACK)
