"""Sessions against an oracle: any order of calls has the answers of an undisturbed run."""

import asyncio
import itertools
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import alone
from support.redis_server import RedisServer, needs_redis
from support.sessions import MODEL, ask, replicas
from support.values import random_values

from unroll_engine.errors import RequestError, SequenceStateError
from unroll_engine.models.spec import Float32Array
from unroll_server.errors import SessionNotFoundError, SessionTakenError
from unroll_server.sessions.chunk import Advance
from unroll_server.sessions.memory_store import MemoryStore
from unroll_server.sessions.redis_store import RedisStore
from unroll_server.sessions.service import Sessions
from unroll_server.sessions.store import Store

IDS = itertools.count()


class Oracle:
    """Reference sessions: the chunks of each, applied one after another."""

    def __init__(self) -> None:
        self.values: dict[str, Float32Array] = {}
        self.last: dict[str, tuple[int, bytes]] = {}

    def advance(self, request: Advance) -> bytes | type[RequestError]:
        name, values = request.session_id, request.values
        assert not callable(values)
        if request.start:
            self.values[name] = values[:0]
        elif name not in self.values:
            return SessionNotFoundError
        step, first = len(self.values[name]), request.first_step
        if not request.start and first is not None and first != step:
            if self.last.get(name) == (first, values.tobytes()):
                return alone(MODEL, self.values[name], None)[1][first:].tobytes()
            return SequenceStateError if first > step else SessionTakenError
        self.values[name] = np.concatenate([self.values[name], values])
        self.last[name] = (step, values.tobytes())
        answer = alone(MODEL, self.values[name], None)[1][step:].tobytes()
        if request.end:
            del self.values[name], self.last[name]
        return answer


STEPS = st.tuples(
    st.sampled_from("ab"),
    st.integers(0, 1),  # the replica
    st.sampled_from(["start", "continue", "continue", "numbered", "numbered", "again", "stale", "gap", "end"]),
    st.integers(1, 7),
)


async def outcome_of(sessions: Sessions, request: Advance) -> bytes | type[RequestError]:
    try:
        return (await sessions.advance(request)).states.tobytes()
    except RequestError as error:
        return type(error)


async def compare(actions: list[tuple[str, int, str, int]], stores: list[Store]) -> None:
    """Runs actions on two replicas and on the oracle, and compares every answer."""
    prefix, oracle = f"{next(IDS)} ", Oracle()
    sent: dict[str, Advance] = {}
    async with replicas(*stores) as both:
        for number, (name, replica, action, count) in enumerate(actions):
            session_id = prefix + name
            step = len(oracle.values.get(session_id, ()))
            request = ask(session_id, random_values(count, number), model="m", version=1)
            if action == "start":
                request = replace(request, start=True)
            elif action in ("numbered", "end"):
                request = replace(request, first_step=step, end=action == "end")
            elif action == "again" and session_id in sent:
                request = sent[session_id]
            elif action == "stale":
                request = replace(request, first_step=max(step - 1, 0))
            elif action == "gap":
                request = replace(request, first_step=step + 3)
            if request.first_step is not None and not request.end:
                sent[session_id] = request
            elif request.end or request.start:
                sent.pop(session_id, None)
            assert await outcome_of(both[replica], request) == oracle.advance(request), (action, request)


@settings(max_examples=60)
@given(actions=st.lists(STEPS, min_size=1, max_size=25))
def test_any_order_of_calls_has_the_answers_of_a_plain_run(actions: list[tuple[str, int, str, int]]) -> None:
    store = MemoryStore(60, 100)
    asyncio.run(compare(actions, [store, store]))


@needs_redis
def test_any_order_of_calls_to_two_replicas_has_the_answers_of_a_plain_run(redis_server: RedisServer) -> None:
    @settings(max_examples=25)
    @given(actions=st.lists(STEPS, min_size=1, max_size=25))
    def check(actions: list[tuple[str, int, str, int]]) -> None:
        asyncio.run(compare(actions, [RedisStore(redis_server.url, 60) for _ in range(2)]))

    check()
