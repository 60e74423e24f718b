"""Sequences that last: streams that outlive their servers, slow readers, sessions by id."""

import asyncio

import grpc.aio
import numpy as np
from support import wire

from soak.ledger import Ledger
from soak.oracle import CLASSES, FEATURES, HIDDEN, NAME, Oracle
from unroll_client import Aborted, AsyncClient, NotFound, SessionSteps, UnrollError
from unroll_engine.models.spec import Float32Array

STEPS = 400
"""Steps of a stream."""
CHUNK = 20
"""Steps of the largest chunk."""


async def stream(
    client: AsyncClient, oracle: Oracle, ledger: Ledger, rng: np.random.Generator, version: int, pause: float
) -> None:
    """Streams sequence after sequence; every step must come once, in order, to the bit.

    Args:
        client: Of the servers.
        oracle: What they must answer.
        ledger: Counts.
        rng: Makes the sequences and their cuts.
        version: Of the model; 0 is the newest at the time.
        pause: Seconds between chunks, on average.
    """
    while True:
        values = rng.standard_normal((int(rng.integers(1, STEPS)), FEATURES), np.float32)
        try:
            async with client.unroll(NAME, version=version, logits=True) as sequence:
                logits, states = oracle.answer(sequence.version, values)
                begin = 0
                while begin < len(values):
                    chunk = values[begin : begin + int(rng.integers(1, CHUNK + 1))]
                    answer = await sequence.send(chunk)
                    end = begin + len(chunk)
                    assert answer.states is not None
                    assert answer.logits is not None
                    if (answer.first_step, len(answer.states)) != (begin, len(chunk)):
                        ledger.lost += 1
                        break
                    same = answer.states.tobytes() == states[begin:end].tobytes()
                    same &= answer.logits.tobytes() == logits[begin:end].tobytes()
                    ledger.check("stream chunks", same, f"steps {begin} to {end}, version {sequence.version}")
                    begin = end
                    await asyncio.sleep(float(rng.exponential(pause)))
        except UnrollError as error:
            # A stream that names its version can go on anywhere, so nothing excuses its end.
            ledger.failure("streams", error)
            ledger.lost += version != 0
            await asyncio.sleep(0.05)


async def read_slowly(channel: grpc.aio.Channel, oracle: Oracle, ledger: Ledger, rng: np.random.Generator) -> None:
    """Sends a long sequence at once and takes its answers one by one, now and then."""
    stub = wire.stub_of(channel)
    while True:
        values = rng.standard_normal((3000, FEATURES), np.float32)
        requests = [wire.open_request("a", NAME), wire.chunk_request("a", 0, values), wire.close_request("a")]
        version, parts = 0, []
        try:
            async for response in stub.Unroll(iter(requests)):
                if response.HasField("opened"):
                    version = response.opened.version
                elif response.HasField("steps"):
                    parts.append(response.steps)
                await asyncio.sleep(float(rng.exponential(0.02)))
        except grpc.aio.AioRpcError as error:
            ledger.failure("slow readers", error)
            continue
        ledger.fault("slow readers")
        logits, states = oracle.answer(version, values)
        got = [wire.to_array(b"".join(getattr(part, name) for part in parts), width) for name, width in _OUTPUTS]
        ledger.lost += len(values) - len(got[0])
        same = got[0].tobytes() == states.tobytes() and got[1].tobytes() == logits.tobytes()
        ledger.check("slow readers", same, f"{len(parts)} answers, version {version}")


async def session(client: AsyncClient, oracle: Oracle, ledger: Ledger, rng: np.random.Generator, name: str) -> None:
    """Goes on with a session again and again, at times twice with the same steps; each must count once, to the bit.

    Args:
        client: Of the server.
        oracle: What it must answer.
        ledger: Counts.
        rng: Makes the sequences and their cuts.
        name: Id of the session. A sequence in three is left unfinished, and the next one begins the session anew.
    """
    while True:
        values = rng.standard_normal((int(rng.integers(1, STEPS)), FEATURES), np.float32)
        ends, begin, version = bool(rng.random() < 2 / 3), 0, 0
        try:
            while begin < len(values):
                chunk = values[begin : begin + int(rng.integers(1, CHUNK + 1))]
                end = begin + len(chunk)
                last = ends and end == len(values)
                answer = await _advance(client, ledger, rng, name, chunk, begin, last)
                if answer is None:
                    ledger.right("sessions that had ended on a version that has left")
                    break
                version = version or answer.version
                if (answer.first_step, answer.count, answer.step) != (begin, len(chunk), end):
                    ledger.lost += 1
                    break
                assert answer.states is not None
                assert answer.logits is not None
                logits, states = oracle.answer(version, values)
                same = answer.version == version and answer.states.tobytes() == states[begin:end].tobytes()
                same &= answer.logits.tobytes() == logits[begin:end].tobytes()
                ledger.check("session chunks", same, f"steps {begin} to {end}, version {answer.version}")
                begin = end
                await asyncio.sleep(float(rng.exponential(0.1)))
        except UnrollError as error:
            ledger.failure("sessions", error)
            ledger.lost += 1
            await asyncio.sleep(0.05)


async def _advance(
    client: AsyncClient,
    ledger: Ledger,
    rng: np.random.Generator,
    name: str,
    chunk: Float32Array,
    begin: int,
    last: bool,
) -> SessionSteps | None:
    """One chunk: sent once, or given up and sent again, or answered and sent again.

    None where it was the last one, applied already, and its version has left since.
    """

    async def once() -> SessionSteps:
        start, model = begin == 0, NAME if begin == 0 else None
        return await client.advance(name, chunk, model=model, start=start, end=last, first_step=begin, logits=True)

    async def again() -> SessionSteps | None:
        try:
            return await once()
        except NotFound:
            if last and begin:
                return None
            raise

    how = rng.random()
    if how < 0.1:
        given_up = asyncio.create_task(once())
        await asyncio.sleep(float(rng.exponential(0.003)))
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        ledger.fault("session calls cancelled")
        try:
            return await again()
        except Aborted:
            # The call that was given up was another writer, and is over now.
            return await again()
    if how < 0.2 and begin:
        await once()
        ledger.fault("session chunks sent twice")
        return await again()
    return await once()


_OUTPUTS = (("states", HIDDEN), ("logits", CLASSES))
