"""A hundred streams, two real servers that are killed, drained and started again: no step lost, doubled or changed."""

import asyncio
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.processes import ServerProcess

from unroll_client import AsyncClient, AsyncSequence, Steps
from unroll_proto.sequences import Sequence

Float32Array = NDArray[np.float32]

STREAMS = 100
CLIENTS = 4
EXAMPLES = int(os.environ.get("UNROLL_SURVIVAL_EXAMPLES", "2"))
"""Runs of random faults."""
PATIENCE = 120.0
"""Seconds after which a step counts as stuck, on a busy machine too."""


@dataclass(frozen=True)
class Fault:
    """A fault of a replica.

    Attributes:
        replica: 0 or 1.
        after: Share of all steps answered before it.
        number: SIGKILL or SIGTERM.
    """

    replica: int
    after: float
    number: signal.Signals


class Replica:
    """A server that restarts on the same port."""

    def __init__(self, models: Path, folder: Path) -> None:
        self._models = models
        self._folder = folder
        self._starts = 0
        self._process = self._started("127.0.0.1:0")
        self.address = self._process.address

    def _started(self, listen: str) -> ServerProcess:
        self._starts += 1
        log = self._folder / f"log{self._starts}"
        return ServerProcess(self._models, log, "--listen", listen)

    def end(self, number: signal.Signals) -> None:
        self._process.signal(number)
        code = self._process.wait()
        assert code == (0 if number == signal.SIGTERM else -number), self._process.log

    def start(self) -> None:
        self._process = self._started(self.address)

    def stop(self) -> None:
        assert self._process.stop() == 0, self._process.log


class Progress:
    """Number of answered steps, over all streams."""

    def __init__(self) -> None:
        self.steps = 0
        self.changed = asyncio.Condition()

    async def add(self, steps: int) -> None:
        async with self.changed:
            self.steps += steps
            self.changed.notify_all()

    async def reach(self, steps: float) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.steps >= steps)


async def sent(sequence: AsyncSequence, values: Float32Array, seed: int, progress: Progress) -> list[Steps]:
    """Sends a sequence in pieces, sometimes two at a time; returns the answers."""
    random = np.random.default_rng(seed)
    parts: list[Steps] = []

    async def send(chunk: Float32Array) -> list[Steps]:
        found = []
        async for steps in sequence.stream(chunk):
            found.append(steps)
            await progress.add(steps.count)
        return found

    start = 0
    async with sequence:
        while start < len(values):
            sizes = random.integers(1, 8, size=random.integers(1, 3))
            ends = np.minimum(start + np.cumsum(sizes), len(values))
            pieces = [piece for piece in np.split(values[start : ends[-1]], ends[:-1] - start) if len(piece)]
            for answers in await asyncio.gather(*map(send, pieces)):
                parts += answers
            start = int(ends[-1])
    return parts


async def disturbed(
    replicas: list[Replica], values: list[Float32Array], faults: list[Fault], seed: int
) -> list[tuple[list[Steps], bytes]]:
    """Returns the answers of each stream during the faults, and the bits of its last state."""
    progress, total = Progress(), sum(map(len, values))
    addresses = [replica.address for replica in replicas]

    async def inflict(fault: Fault, replica: Replica, lock: asyncio.Lock) -> None:
        await progress.reach(fault.after * total)
        async with lock:
            await asyncio.to_thread(replica.end, fault.number)
            await asyncio.to_thread(replica.start)

    async def stream(client: AsyncClient, index: int) -> tuple[list[Steps], bytes]:
        sequence = client.unroll("jv", logits=True)
        parts = await sent(sequence, values[index], seed + index, progress)
        last = await sequence.close()
        assert last.step == len(values[index])
        return parts, last.state[0].tobytes()

    locks = [asyncio.Lock() for _ in replicas]
    clients = [
        AsyncClient(
            addresses[index % 2 :] + addresses[: index % 2],
            timeout=PATIENCE,
            reconnect_timeout=PATIENCE,
            wait_for_ready=True,
        )
        for index in range(CLIENTS)
    ]
    try:
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                group.create_task(inflict(fault, replicas[fault.replica], locks[fault.replica]))
            streams = [group.create_task(stream(clients[index % CLIENTS], index)) for index in range(len(values))]
    finally:
        for client in clients:
            await client.close()
    return [task.result() for task in streams]


async def undisturbed(address: str, values: list[Float32Array]) -> list[tuple[bytes, bytes, bytes]]:
    """Returns states, logits and last state of each sequence, sent in one piece."""

    async def whole(client: AsyncClient, each: Float32Array) -> tuple[bytes, bytes, bytes]:
        async with client.unroll("jv", logits=True) as sequence:
            steps = await sequence.send(each)
        assert steps.states is not None
        assert steps.logits is not None
        return steps.states.tobytes(), steps.logits.tobytes(), (await sequence.close()).state[0].tobytes()

    async with AsyncClient(address, timeout=PATIENCE) as client:
        return await asyncio.gather(*(whole(client, each) for each in values))


FAULTS = st.builds(
    Fault, st.integers(0, 1), st.floats(0, 0.9), st.sampled_from([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
)


def test_no_step_is_lost_doubled_or_changed(bundle_root: Path, tmp_path: Path, vowels: list[Sequence]) -> None:
    values = [np.concatenate([each.values for each in vowels[start : start + 4]]) for start in range(STREAMS)]
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    replicas = [Replica(bundle_root, folder) for folder in folders]
    expected = asyncio.run(undisturbed(replicas[0].address, values))

    @settings(
        max_examples=EXAMPLES,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(faults=st.lists(FAULTS, min_size=2, max_size=4), seed=st.integers(0, 2**20))
    def survive(faults: list[Fault], seed: int) -> None:
        note(f"{faults}, seed {seed}")
        answers = asyncio.run(disturbed(replicas, values, faults, seed))
        for (parts, last), each, (states, logits, final) in zip(answers, values, expected, strict=True):
            steps = np.concatenate([part.steps for part in parts])
            assert steps.tolist() == list(range(len(each)))
            assert b"".join(part.states.tobytes() for part in parts if part.states is not None) == states
            assert b"".join(part.logits.tobytes() for part in parts if part.logits is not None) == logits
            assert last == final

    survive()
    for replica in replicas:
        replica.stop()
