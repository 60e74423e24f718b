"""Open sequences on streams of unroll.v1 Unroll, each fed at a cadence or as fast as it is answered."""

import asyncio
from collections import deque
from collections.abc import Callable
from itertools import count, takewhile
from time import perf_counter

import numpy as np
from google.rpc import code_pb2
from numpy.typing import NDArray

from unroll_bench.load.calls import Stream, framed
from unroll_bench.load.frames import OK
from unroll_bench.load.pool import Peer, Pool
from unroll_bench.load.result import Result, Tally
from unroll_bench.load.running import PATIENCE, quiet
from unroll_bench.load.schedule import on_schedule
from unroll_proto.v1 import unroll_pb2 as pb

PATH = "/unroll.v1.UnrollService/Unroll"

# Messages of a stream that a server reads ahead; one that is further behind has stopped.
_MOST_UNANSWERED = 256


class _Frame:
    """Sequences whose chunks travel in one message."""

    __slots__ = ("sequences", "waiting")

    def __init__(self) -> None:
        self.sequences: list[_Sequence] = []
        self.waiting = 0  # chunks without an answer


class _Sequence:
    """One open sequence: the chunks sent, and the steps answered."""

    __slots__ = ("answered", "carrier", "frame", "gone", "key", "live", "sent", "unanswered")

    def __init__(self, index: int, carrier: "_Carrier", frame: _Frame) -> None:
        self.key = str(index)
        self.carrier = carrier
        self.frame = frame
        self.live = False
        self.gone = False
        self.sent = 0
        self.answered = 0
        self.unanswered: deque[float] = deque()  # intended start of each chunk


class _Carrier(Stream):
    """One call of Unroll."""

    __slots__ = ("over", "run", "sequences")

    def __init__(self, run: "_Run") -> None:
        super().__init__()
        self.run = run
        self.sequences: list[_Sequence] = []
        self.over = False

    def message(self, data: bytes, now: float) -> None:
        response = self.run.response
        response.ParseFromString(data)
        event = response.WhichOneof("event")
        if event == "steps_batch":
            self.run.batch_answered(response.steps_batch, now)
            return
        sequence = self.run.sequences[int(response.key)]
        if sequence.gone:
            return
        if event == "steps":
            self.run.answered(sequence, response.steps, now)
        elif event == "opened":
            sequence.live = not sequence.gone
            self.run.opening -= 1
            self.run.settle()
        elif event == "error":
            name = code_pb2.Code.Name(response.error.code)
            self.run.lose(sequence, f"{name}: {response.error.message}")
        else:
            reason = pb.SequenceClosed.Reason.Name(response.closed.reason)
            self.run.lose(sequence, f"closed: {reason.removeprefix('REASON_')}")

    def ended(self, status: str, now: float) -> None:
        self.over = True
        if self.run.closed:  # these calls are counted already
            return
        for sequence in self.sequences:
            if not (status == OK and self.run.over):
                self.run.lose(sequence, "the stream ended with OK" if status == OK else status)
        self.run.settle()


class _Run:
    def __init__(
        self,
        sequences: int,
        streams: int,
        chunks: list[bytes],
        chunk_steps: int,
        batch: int,
        check: Callable[[pb.Steps], bool] | None,
        feed: bool,
        tally: Tally,
    ) -> None:
        self.carriers = [_Carrier(self) for _ in range(streams)]
        self.frames: list[_Frame] = []
        self.sequences: list[_Sequence] = []
        for index in range(sequences):
            carrier = self.carriers[index % streams]
            if len(carrier.sequences) % batch == 0:
                self.frames.append(_Frame())
                frame = self.frames[-1]
            else:
                frame = carrier.sequences[-1].frame
            self.sequences.append(_Sequence(index, carrier, frame))
            for several in (carrier, frame):
                several.sequences.append(self.sequences[-1])
        self.tally = tally
        self.over = False
        self.closed = False
        self.opening = sequences
        self.open = sequences
        self._chunks = chunks
        self._chunk_steps = chunk_steps
        self._check = check
        self._feed = feed
        # One message of each kind for all: refilling one takes a third of the time of making it.
        self.response = pb.UnrollResponse()
        self._request = pb.UnrollRequest()
        self._batch = pb.ChunkBatch()
        self._steps = pb.Steps()
        self._until: Callable[[], bool] = lambda: True
        self._changed = asyncio.Event()

    def send(self, frame: _Frame, moment: float) -> None:
        """Sends the next chunks of a frame's sequences, whose intended start is `moment`."""
        steps, chunks, request, batch = self._chunk_steps, self._chunks, self._request, self._batch
        keys, first_steps, values = [], [], []
        for sequence in frame.sequences:
            if not sequence.live or len(sequence.unanswered) >= _MOST_UNANSWERED:
                if not self._feed:
                    self.tally.errors["not sent"] += 1
                continue
            sent = sequence.sent
            keys.append(sequence.key)
            first_steps.append(sent)
            values.append(chunks[sent // steps % len(chunks)])
            sequence.sent = sent + steps
            sequence.unanswered.append(moment)
        if not keys:
            return
        frame.waiting += len(keys)
        self.tally.in_flight += len(keys)
        if len(frame.sequences) == 1:
            request.key, chunk = keys[0], request.chunk
            chunk.first_step, chunk.values = first_steps[0], values[0]
        else:
            batch.keys[:], batch.first_steps[:], batch.values[:] = keys, first_steps, values
            request.chunks.CopyFrom(batch)
        frame.sequences[0].carrier.send(framed(request.SerializeToString()))

    def batch_answered(self, batch: pb.StepsBatch, now: float) -> None:
        """Handles answers to chunks of several sequences."""
        steps = self._steps
        # A model has either states or, without, its outputs.
        empty = [b""] * len(batch.keys)
        fields = batch.keys, batch.first_steps, batch.counts, batch.states or empty, batch.logits or empty
        for key, first, covered, states, logits in zip(*fields, strict=True):
            sequence = self.sequences[int(key)]
            if not sequence.gone:
                steps.first_step, steps.count, steps.states, steps.logits = first, covered, states, logits
                self.answered(sequence, steps, now)

    def answered(self, sequence: _Sequence, steps: pb.Steps, now: float) -> None:
        """Handles an answer: a part of a chunk, its rest, or several chunks."""
        tally = self.tally
        first, after = sequence.answered, sequence.answered + steps.count
        follows = steps.first_step == first and first < after <= sequence.sent
        if not follows or (self._check is not None and not self._check(steps)):
            tally.wrong += 1
        if not follows:
            self.lose(sequence, "steps that were not asked for")
            return
        sequence.answered = after
        if tally.begin <= now < tally.end:
            tally.messages += 1
        missing = -(-(sequence.sent - after) // self._chunk_steps)
        frame = sequence.frame
        for _ in range(len(sequence.unanswered) - missing):
            moment = sequence.unanswered.popleft()
            tally.in_flight -= 1
            frame.waiting -= 1
            if tally.begin <= (now if self._feed else moment) < tally.end:
                tally.latencies.append(now - moment)
                tally.last = now
        if self._feed and not (frame.waiting or self.over):
            self.send(frame, perf_counter())
        if self.over:
            self.settle()

    def lose(self, sequence: _Sequence, reason: str) -> None:
        """Drops a sequence that can't continue."""
        if sequence.gone:
            return
        if not sequence.live:
            self.opening -= 1
        sequence.live = False
        sequence.gone = True
        self.open -= 1
        self.tally.in_flight -= len(sequence.unanswered)
        sequence.frame.waiting -= len(sequence.unanswered)
        self.tally.errors[reason] += 1
        sequence.unanswered.clear()
        self.settle()

    def settle(self) -> None:
        """Checks the condition that `wait` waits for."""
        if self._until():
            self._changed.set()

    async def wait(self, until: Callable[[], bool], seconds: float) -> bool:
        """Waits until answers make a condition true; returns False if that takes too long."""
        self._until = until
        self._changed.clear()
        self.settle()
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True


async def stream_loop(
    address: str | Peer,
    *,
    sequences: int,
    streams: int,
    cadence: float | None,
    chunk_steps: int,
    seconds: float,
    model: str,
    values: NDArray[np.float32],
    batch: int = 1,
    check: Callable[[pb.Steps], bool] | None = None,
    version: int = 0,
    warm_up: float = 0.5,
    connections: int = 1,
    tally: Tally | None = None,
) -> Result:
    """Keeps sequences open and sends chunks of steps to each until the time is over.

    With a cadence, the chunks of all sequences are spread evenly over it, none waits for an answer, and latencies count
    from the intended start. Without, an answer starts the sequence's next chunk.

    Args:
        address: The server, HOST:PORT or more of it (`Peer`).
        sequences: Open sequences, all with the same values.
        streams: Calls of Unroll that carry them.
        cadence: Seconds between the chunks of a sequence.
        chunk_steps: Timesteps of a chunk.
        seconds: Length of the measured window.
        model: Name of the model.
        batch: Most sequences of a stream whose chunks share a message. In a closed loop they continue when all
            are answered.
        values: float32 [n, features]; each sequence goes through as many whole chunks as there are, over and over.
        check: Returns True if an answer is right; called for every one.
        version: Version of the model; 0 for the newest.
        warm_up: Seconds before the window, once all sequences are open.
        connections: TCP connections that carry the streams.
        tally: Filled meanwhile, to be looked at.

    Returns:
        A latency a chunk, until its last step was answered; `messages` are the answers that brought them. A sequence
        that is lost is one error, and each chunk that it would have sent the error "not sent".

    Raises:
        OSError: the server can't be reached.
        ValueError: an argument makes no sense.
    """
    usable = len(values) // max(chunk_steps, 1) * chunk_steps
    if min(sequences, streams, chunk_steps, batch, connections, usable) < 1 or streams > sequences:
        raise ValueError(
            "sequences, streams, chunk_steps, batch, connections: 1 or more, and a sequence for each stream"
        )
    if seconds <= 0 or (cadence is not None and cadence <= 0):
        raise ValueError("seconds, cadence: more than 0 expected")
    raw = np.ascontiguousarray(values[:usable], "<f4")
    chunks = [raw[at : at + chunk_steps].tobytes() for at in range(0, usable, chunk_steps)]
    peer = address if isinstance(address, Peer) else Peer(address)
    tally = tally or Tally()
    run = _Run(sequences, streams, chunks, chunk_steps, batch, check, cadence is None, tally)
    pool = Pool(peer, connections, tally, lambda line: None)
    opening = pb.OpenSequence(model=model, version=version, return_states=True)
    try:
        with quiet():
            await pool.open()
            headers = peer.headers(PATH, deadline=False)
            for index, carrier in enumerate(run.carriers):
                pool.lines[index % connections].open(carrier, headers)
                for sequence in carrier.sequences:
                    request = pb.UnrollRequest(key=sequence.key, open=opening)
                    carrier.send(framed(request.SerializeToString()))
            if not await run.wait(lambda: run.opening == 0, PATIENCE):
                tally.errors["not opened"] += run.opening
            origin = perf_counter()
            tally.begin, tally.end = origin + warm_up, origin + warm_up + seconds
            if cadence is None:
                for frame in run.frames:
                    run.send(frame, perf_counter())
                await run.wait(lambda: run.open == 0, warm_up + seconds)
            else:
                gap = cadence / len(run.frames)
                moments = takewhile(lambda moment: moment < tally.end, (origin + turn * gap for turn in count()))
                turns = count()
                await on_schedule(moments, lambda moment: run.send(run.frames[next(turns) % len(run.frames)], moment))
            run.over = True
            if not await run.wait(lambda: tally.in_flight == 0, PATIENCE):
                tally.errors["unanswered"] += tally.in_flight
            ended = perf_counter()
            for carrier in run.carriers:
                carrier.half_close()
            if not await run.wait(lambda: all(carrier.over for carrier in run.carriers), PATIENCE):
                tally.errors["streams that did not end"] += sum(not carrier.over for carrier in run.carriers)
    finally:
        run.over = run.closed = True
        await pool.close()
    lasted = max(min(ended, tally.end), tally.last) - tally.begin
    return tally.result(max(lasted, 0.0))
