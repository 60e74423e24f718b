"""What a server holds, and has under way, over the time of the soak, and whether that comes back."""

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
STEADY = 5.0
"""Seconds for which nothing changes before a run; the server counts its tasks every two."""
POOL = 6
"""Threads that asyncio's pool grows to as they are needed, and keeps."""
SLACK = 16 * 2**20
"""Bytes that a server may grow by while it warms up, beside `GROWTH`."""
GROWTH = 0.10
"""How much of its memory a server may gain from the second quarter of a run to the last."""
HELD = ("descriptors", "threads", "tasks", "queued", "sequences", "calls")
"""Of a sample: what must come back to where it began."""
BUGS = ("Internal", "Unknown", "DataLoss")
"""Statuses that no caller may ever get."""


@dataclass(frozen=True)
class Sample:
    """One look at a server.

    Attributes:
        seconds: When.
        resident: Bytes of memory.
        descriptors: That are open.
        threads: Of all its processes.
        tasks: Of its event loops.
        queued: Timesteps and bytes that are accepted and not answered.
        sequences: Open on streams.
        calls: That have come and not ended.
        bugs: Calls that have ended with one of `BUGS`.
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
        """What must come back to where it began."""
        return [getattr(self, name) for name in HELD]


def look(server: ServerProcess, metrics: str) -> Sample:
    """Looks at all processes of a server.

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
    """Takes a sample again and again, until cancelled."""
    while True:
        samples.append(await asyncio.to_thread(looking))
        await asyncio.sleep(INTERVAL)


async def steady(looking: Callable[[], Sample]) -> Sample:
    """Waits until a server that has just been started holds the same for a while; the last sample."""
    since = now = await asyncio.to_thread(looking)
    while now.seconds - since.seconds < STEADY:
        await asyncio.sleep(INTERVAL / 4)
        now = await asyncio.to_thread(looking)
        if now.held != since.held:
            since = now
    return now


def let_go(start: Sample, end: Sample) -> bool:
    """Whether a server without callers holds no more than at its start."""
    more = zip(HELD, start.held, end.held, strict=True)
    return all(after <= before + (POOL if name == "threads" else 0) for name, before, after in more)


async def settled(start: Sample, looking: Callable[[], Sample]) -> Sample:
    """Waits until the server holds no more than at `start`, or its patience is over; the last sample."""
    until = time.monotonic() + PATIENCE
    while True:
        now = await asyncio.to_thread(looking)
        if let_go(start, now) or now.seconds > until:
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
