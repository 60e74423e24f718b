"""One call of Unroll: bounds of reading, computing and unread answers, and drains."""

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest
from support import wire
from support.models import alone, random_network, served
from support.processes import PATIENCE
from support.streams import answers_of, stream_of
from support.values import random_values

from unroll_engine.async_engine import AsyncEngine
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server.api.native.answers import MAX_UNSENT_BYTES
from unroll_server.api.native.stream import MAX_UNANSWERED_BYTES, Stream
from unroll_server.config import Limits
from unroll_server.errors import DrainingError
from unroll_server.repository.catalog import Catalog
from unroll_server.sequence import PIECE_STEPS
from unroll_server.telemetry.metrics import Metrics
from unroll_server.telemetry.metrics.figures import MODEL_SIZE, QUEUED_STEPS, REAL, SERVER_SIZE

MODEL = served(random_network(hidden=1024))
STATE = 4 * MODEL.spec.hidden_size
"""Bytes of a step's answer."""
LIMITS = Limits(max_sequences=10, max_steps=10**6, max_open_sequences=1000, max_message_bytes=2**31 - 1)


class Caller:
    """Sends requests on demand; `sent` counts their bytes."""

    def __init__(self, requests: list[pb.UnrollRequest]) -> None:
        self.sent = 0
        self._requests = requests

    async def requests(self) -> AsyncIterator[pb.UnrollRequest]:
        for request in self._requests:
            self.sent += request.ByteSize()
            yield request


class Serving:
    """An engine with metrics."""

    def __init__(self) -> None:
        self._metrics = Metrics()
        self._catalog = Catalog([MODEL], metrics=self._metrics)
        self.engine = AsyncEngine([MODEL], max_lanes=64, tick_steps=32, max_queued_steps=10**8, metrics=self._metrics)

    def stream(self) -> Stream:
        """A stream."""
        return stream_of(self._catalog, self.engine, LIMITS)

    def responses(self, requests: AsyncIterator[pb.UnrollRequest]) -> AsyncGenerator[pb.UnrollResponse, None]:
        """Returns the responses of a stream."""
        return answers_of(self.stream(), requests)

    @property
    def steps(self) -> int:
        """Number of computed steps."""
        return int(self._metrics.memory.sums("model", MODEL_SIZE)[str(MODEL.spec.key)][REAL])

    async def settle(self) -> None:
        """Waits until everything is computed that can be before a read."""
        idle = 0
        while idle < 100:
            queued = self._metrics.memory.sums("server", SERVER_SIZE)[""][QUEUED_STEPS]
            idle = 0 if queued else idle + 1
            await asyncio.sleep(0)


@pytest.fixture
async def serving() -> AsyncIterator[Serving]:
    serving = Serving()
    yield serving
    await asyncio.to_thread(serving.engine.close)


def chunks_of(keys: int, pieces: int) -> tuple[list[pb.UnrollRequest], wire.Array]:
    """A chunk of the same values for each of several keys."""
    values = random_values(pieces * PIECE_STEPS)
    names = [str(index) for index in range(keys)]
    opened = [wire.open_request(name, "m", return_logits=False) for name in names]
    return [*opened, *(wire.chunk_request(name, 0, values) for name in names)], values


async def test_a_slow_reader_s_answers_are_not_computed_far_ahead_however_large_they_are(serving: Serving) -> None:
    requests, values = chunks_of(keys=60, pieces=2)
    expected = alone(MODEL, values, None)[1].tobytes()
    got: dict[str, bytes] = {}
    async with aclosing(serving.responses(Caller(requests).requests())) as responses:
        assert (await anext(responses)).HasField("opened")
        await serving.settle()
        assert 0 < serving.steps * STATE <= MAX_UNSENT_BYTES + PIECE_STEPS * STATE
        before = 0
        async for response in responses:
            if not response.HasField("steps"):
                continue
            got[response.key] = got.get(response.key, b"") + response.steps.states
            before += len(response.steps.states)
            if len(got) == 1:
                # No more is computed in advance, however far the stream has read.
                await serving.settle()
                assert serving.steps * STATE <= before + MAX_UNSENT_BYTES + PIECE_STEPS * STATE
    assert set(got.values()) == {expected}
    assert len(got) == 60


async def test_chunks_of_one_key_are_not_computed_far_ahead_either(serving: Serving) -> None:
    values = random_values(80 * 40)
    parts = range(0, len(values), 40)
    requests = [wire.open_request("a", "m", return_logits=False)]
    requests += [wire.chunk_request("a", begin, values[begin : begin + 40]) for begin in parts]
    requests += [wire.snapshot_request("a"), wire.close_request("a")]
    async with aclosing(serving.responses(Caller(requests).requests())) as responses:
        assert (await anext(responses)).HasField("opened")
        await serving.settle()
        assert 0 < serving.steps < len(values) - 40
        rest = [response async for response in responses]
    states = b"".join(response.steps.states for response in rest)
    assert states == alone(MODEL, values, None)[1].tobytes()
    assert rest[-2].snapshot.step == len(values)
    assert rest[-1].HasField("closed")


async def test_chunks_of_one_message_are_not_computed_far_ahead_of_a_slow_reader(serving: Serving) -> None:
    keys, steps = 500, 16
    values = random_values(keys * steps).reshape(keys, steps, 3)
    names = [str(index) for index in range(keys)]
    requests = [wire.open_request(name, "m", return_logits=False) for name in names]
    requests.append(wire.chunks_request(names, [0] * keys, values))
    states: dict[str, bytes] = {}
    async with aclosing(serving.responses(Caller(requests).requests())) as responses:
        for _ in names:
            assert (await anext(responses)).HasField("opened")
        await serving.settle()
        assert 0 < serving.steps * STATE <= MAX_UNSENT_BYTES + steps * STATE
        before = 0
        async for response in responses:
            batch = response.steps_batch
            states |= dict(zip(batch.keys, batch.states, strict=True))
            before += sum(map(len, batch.states))
            await serving.settle()
            assert serving.steps * STATE <= before + MAX_UNSENT_BYTES + steps * STATE
    assert [states[name] for name in names] == [alone(MODEL, each, None)[1].tobytes() for each in values]


async def test_a_drain_ends_the_rest_of_a_message(serving: Serving) -> None:
    """The rest is not applied, as the snapshots show."""
    keys, steps = 500, 16
    names = [str(index) for index in range(keys)]
    requests = [wire.open_request(name, "m", return_logits=False) for name in names]
    requests.append(wire.chunks_request(names, [0] * keys, np.ones((keys, steps, 3), np.float32)))
    stream = serving.stream()
    answered: set[str] = set()
    closed: dict[str, int] = {}
    async with aclosing(answers_of(stream, Caller(requests).requests())) as responses:
        for _ in names:
            assert (await anext(responses)).HasField("opened")
        await serving.settle()
        stream.drain(half_close_timeout=PATIENCE)
        async for response in responses:
            answered.update(response.steps_batch.keys)
            if response.HasField("closed"):
                closed[response.key] = response.closed.snapshot.step
    assert 0 < len(answered) < keys
    assert closed == {name: steps * (name in answered) for name in names}


async def test_a_slow_reader_s_messages_are_not_read_far_ahead_however_large_they_are(serving: Serving) -> None:
    values = np.zeros((10**6, 3), np.float32)
    requests = [wire.open_request("a", "m", return_states=False, return_logits=False, every=10**6)]
    requests += [wire.chunk_request("a", index * len(values), values) for index in range(6)]
    caller = Caller(requests)
    async with aclosing(serving.responses(caller.requests())) as responses:
        assert (await anext(responses)).HasField("opened")
        for _ in range(1000):
            await asyncio.sleep(0)
        assert MAX_UNANSWERED_BYTES <= caller.sent <= MAX_UNANSWERED_BYTES + 2 * values.nbytes


@pytest.mark.parametrize(("sent_before", "steps"), [(0, {}), (1, {"a": 0}), (2, {"a": 2}), (3, {"a": 2, "b": 0})])
async def test_a_sequence_that_a_drain_keeps_from_opening_is_refused_with_its_stream(
    serving: Serving, sent_before: int, steps: dict[str, int]
) -> None:
    """The caller half-closes, so a stream that merely ended would look complete."""
    stream, sent, drained = serving.stream(), asyncio.Event(), asyncio.Event()
    requests = [wire.open_request(key, "m") for key in ("a", "b")]
    requests.insert(1, wire.chunk_request("a", 0, np.zeros((2, 3), np.float32)))

    async def caller() -> AsyncIterator[pb.UnrollRequest]:
        for request in requests[:sent_before]:
            yield request
        sent.set()
        await drained.wait()
        for request in requests[sent_before:]:
            yield request

    async def drain() -> None:
        await sent.wait()
        stream.drain(half_close_timeout=PATIENCE)
        drained.set()

    draining = asyncio.create_task(drain())
    ended: dict[str, pb.UnrollResponse] = {}
    status = "OK"
    try:
        async for response in answers_of(stream, caller()):
            ended[response.key] = response
    except DrainingError as error:
        status = str(error)
    await draining
    assert {key: response.closed.snapshot.step for key, response in ended.items()} == steps
    assert all(response.closed.reason == pb.SequenceClosed.REASON_DRAINING for response in ended.values())
    refused = "the server is shutting down and has not run all of this stream"
    assert status == ("OK" if len(steps) == 2 else refused)


async def test_an_idle_sequence_costs_its_state_and_little_else() -> None:
    model, count = served(random_network(hidden=8)), 2000
    engine = AsyncEngine([model], max_lanes=64, tick_steps=32, max_queued_steps=10**6)
    limits = replace(LIMITS, max_open_sequences=count)
    values, open_ = np.zeros((1, 3), np.float32).tobytes(), asyncio.Event()

    async def requests() -> AsyncIterator[pb.UnrollRequest]:
        for key in map(str, range(count)):
            # Each in bytes of its own, as from the wire.
            yield pb.UnrollRequest.FromString(pb.UnrollRequest(key=key, open=pb.OpenSequence()).SerializeToString())
            yield pb.UnrollRequest(key=key, chunk=pb.Chunk(values=values))
        await open_.wait()

    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        async with aclosing(answers_of(stream_of(Catalog([model]), engine, limits), requests())) as answers:
            steps = 0
            while steps < count:
                answer = await anext(answers)
                steps += answer.HasField("steps") + len(answer.steps_batch.keys)
            gc.collect()
            each = (tracemalloc.get_traced_memory()[0] - before) / count
    finally:
        tracemalloc.stop()
        await asyncio.to_thread(engine.close)
    assert each - sum(tensor.nbytes for tensor in model.spec.states) < 768, each
