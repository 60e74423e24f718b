"""Run: one sequence on a server, computed step by step, with the snapshots to resume from."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from unroll_client import (
    AsyncClient,
    AsyncSequence,
    DeadlineExceeded,
    ModelInfo,
    ServerDraining,
    Snapshot,
    Unavailable,
    UnrollError,
)
from unroll_web.page.blocks import Block, block_values, blocks_of
from unroll_web.page.frames import Float32Array

MOST_STEPS = 100_000
"""Most timesteps of a run."""
MOST_VALUES = 2**24
"""Most numbers of a run's timesteps, 64 MB."""
DETAILED_STEPS = 1024
"""Timesteps of a run whose whole state, every layer's, is kept; after them only each part's last."""
DETAILED_PART = 64
PART = 512
"""Timesteps of a part, which is what is computed again after a loss; of a part with every layer's state fewer."""
PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Seconds between attempts to reach a lost server; the last one repeats."""
LOSSES = (Unavailable, ServerDraining, DeadlineExceeded)

T = TypeVar("T")
Notify = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Results of the timesteps from `first` on.

    Attributes:
        first: Number of the first timestep.
        states: float32 [n, hidden_size], the last layer's; [n, 0] of a step model.
        logits: float32 [n, output_size].
        probabilities: float32 [n, classes]; [n, 0] of a step model, whose outputs say themselves what they are.
        blocks: float32 [n, width of all blocks], the whole state; None after `DETAILED_STEPS`.
        seconds: Time that the calls took.
    """

    first: int
    states: Float32Array
    logits: Float32Array
    probabilities: Float32Array
    blocks: Float32Array | None
    seconds: float

    def arrays(self) -> dict[str, Float32Array]:
        """Returns the arrays by name."""
        arrays = {"states": self.states, "logits": self.logits, "probabilities": self.probabilities}
        return arrays if self.blocks is None else {**arrays, "blocks": self.blocks}


class Run:
    """One sequence on a server. If the server is lost, the run resumes from its last snapshot, and reports both.

    Args:
        client: A client that does not reconnect by itself.
        model: The model version.
        notify: Receives {"event": "lost" or "resumed", ...}.
        base: Snapshot to start from; None for the zero state.

    Attributes:
        model: The model version.
        blocks: The parts of its state.
        begin: Number of the run's first timestep.
        parts: The answers so far.
    """

    def __init__(self, client: AsyncClient, model: ModelInfo, notify: Notify, base: Snapshot | None = None) -> None:
        self.model = model
        self.blocks: tuple[Block, ...] = blocks_of(model)
        self.begin = base.step if base else 0
        self._room: Float32Array = np.zeros((64, model.input_size), np.float32)
        self._sent = 0
        self.parts: list[Part] = []
        self._client = client
        self._notify = notify
        self._snapshots = {self.begin: base} if base else {}
        self._sequence: AsyncSequence | None = None
        self._step = self.begin

    @property
    def values(self) -> Float32Array:
        """Every timestep sent so far, float32 [steps, input_size], from `begin` on."""
        return self._room[: self._sent]

    @property
    def room(self) -> int:
        """Timesteps that can still be sent."""
        return min(MOST_STEPS, MOST_VALUES // self.model.input_size) - self._sent

    @property
    def bundle(self) -> bytes:
        """Id of the content that computes the run, 16 bytes; empty before it is open or if the server has none."""
        return next((each.bundle for each in self._snapshots.values()), b"")

    async def open(self) -> None:
        """Opens the sequence on the server, unless it is open."""
        await self._surviving(self._open)

    async def advance(self, values: Float32Array) -> AsyncIterator[Part]:
        """Sends the next timesteps and yields their answers, each once, however often the server is lost.

        Args:
            values: [steps, input_size].

        Raises:
            UnrollError: the server refused them.
        """
        if self._sent + len(values) > len(self._room):
            room = np.zeros((2 * (self._sent + len(values)), self.model.input_size), np.float32)
            room[: self._sent] = self.values
            self._room = room
        self._room[self._sent : self._sent + len(values)] = values
        self._sent += len(values)
        end = self.begin + self._sent
        while self._step < end:
            try:
                part = await self._surviving(lambda: self._next(end))
            except UnrollError:
                self._sequence = None
                self._sent = self._step - self.begin
                raise
            self._step += len(part.logits)
            self.parts.append(part)
            yield part

    async def snapshot(self, step: int) -> Snapshot:
        """Returns the state after `step` timesteps; computed from the nearest snapshot before, if it was not kept.

        Raises:
            ValueError: the run has not come that far, or began later.
            UnrollError: the call failed.
        """
        if not self.begin <= step <= self._step:
            raise ValueError(f"step: {step}, the run has {self.begin} to {self._step}")
        if step not in self._snapshots:
            near = max(each for each in self._snapshots if each < step)
            base = self._snapshots[near]
            async with self._client.unroll(base.model, version=base.version, snapshot=base) as sequence:
                await sequence.send(self.values[near - self.begin : step - self.begin])
                self._snapshots[step] = await sequence.snapshot()
        return self._snapshots[step]

    async def close(self) -> None:
        """Ends the sequence on the server."""
        sequence, self._sequence = self._sequence, None
        if sequence is not None and not sequence.over:
            try:
                await sequence.close()
            except UnrollError:
                return  # Its server is gone, and the sequence with it.

    async def _open(self) -> AsyncSequence:
        if self._sequence is None or self._sequence.over:
            base = self._snapshots.get(self._step)
            name, version = self.model.name, self.model.version
            sequence = self._client.unroll(name, version=version, snapshot=base, logits=True)
            await sequence.open()
            if base is None:
                self._snapshots[self._step] = await sequence.snapshot()
            self._sequence = sequence
        return self._sequence

    async def _next(self, end: int) -> Part:
        """Computes the next part; nothing of it is kept if it fails."""
        sequence = await self._open()
        detailed = self._step - self.begin < DETAILED_STEPS
        count = min(end - self._step, DETAILED_PART if detailed else PART)
        first = self._step - self.begin
        chunk = self.values[first : first + count]
        before = time.perf_counter()
        # Sent without waiting in between: the stream answers in the order of the calls.
        size = 1 if detailed else count
        try:
            async with asyncio.TaskGroup() as tasks:
                pairs = [
                    (tasks.create_task(sequence.send(chunk[at : at + size])), tasks.create_task(sequence.snapshot()))
                    for at in range(0, count, size)
                ]
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        seconds = time.perf_counter() - before
        steps = [sent.result() for sent, _ in pairs]
        snapshots = [kept.result() for _, kept in pairs]
        if not detailed and self._step % PART:
            # Of steps that came one by one; the first step of each part is kept.
            self._snapshots.pop(self._step, None)
        self._snapshots.update({each.step: each for each in snapshots})
        logits = np.concatenate([each.logits for each in steps if each.logits is not None])
        states = np.concatenate([each.states for each in steps if each.states is not None])
        probabilities = logits[:, :0]
        if self.model.architecture != "step":
            probabilities = np.concatenate([each.probabilities for each in steps if each.probabilities is not None])
        return Part(
            first=self._step,
            states=states,
            logits=logits,
            probabilities=probabilities,
            blocks=np.stack([block_values(self.blocks, each) for each in snapshots]) if detailed else None,
            seconds=seconds,
        )

    async def _surviving(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeats a call until the server is there again."""
        lost_at = 0.0
        tries = 0
        while True:
            try:
                result = await call()
            except LOSSES as error:
                self._sequence = None
                if not tries:
                    lost_at = time.monotonic()
                    await self._notify({"event": "lost", "step": self._step, "reason": error.message})
                await asyncio.sleep(PAUSES[min(tries, len(PAUSES) - 1)])
                tries += 1
            else:
                if tries:
                    seconds = round(time.monotonic() - lost_at, 3)
                    await self._notify({"event": "resumed", "step": self._step, "seconds": seconds})
                return result
