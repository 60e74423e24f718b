"""Long sequences: streams that outlive their servers, slow readers, sessions by id."""

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
    """Streams sequence after sequence; every step must come once, in order, with the right bits.

    Args:
        client: Client of the servers.
        oracle: Expected answers.
        ledger: Counts.
        rng: Makes the sequences and their cuts.
        version: Version of the model; 0 for the newest.
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
            # A stream with a version can resume anywhere, so it must not end.
            ledger.failure("streams", error)
            ledger.lost += version != 0
            await asyncio.sleep(0.05)


async def read_slowly(channel: grpc.aio.Channel, oracle: Oracle, ledger: Ledger, rng: np.random.Generator) -> None:
    """Sends a long sequence at once and reads its answers slowly."""
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
    """Advances a session repeatedly, sometimes twice with the same steps; each must count once.

    Args:
        client: Client of the server.
        oracle: Expected answers.
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
    """Sends one chunk: once, or again after a cancellation or an answer.

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
            # The cancelled call was another writer, and is over now.
            return await again()
    if how < 0.2 and begin:
        await once()
        ledger.fault("session chunks sent twice")
        return await again()
    return await once()


_OUTPUTS = (("states", HIDDEN), ("logits", CLASSES))
