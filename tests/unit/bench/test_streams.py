"""Streams against the real service: checked bits, a kept cadence, counted losses."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from support.models import alone
from support.values import random_values
from support.waiting import until
from unit.client.harness import MODEL, LocalServer

from unroll_bench.load import Result, Tally, stream_loop, streams
from unroll_bench.load.answers import ClassifyCheck, StepsCheck
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceServicer

VALUES = random_values(13)


async def drive(address: str, **options: Any) -> Result:
    chosen: dict[str, Any] = {"sequences": 5, "streams": 2, "cadence": None, "chunk_steps": 6, "seconds": 0.4}
    chosen |= {"warm_up": 0.1, "model": "m", "values": VALUES, **options}
    return await stream_loop(address, **chosen)


class Expected:
    """Returns the states that the model computes alone, for all steps."""

    def __init__(self, chunk: int, rounds: int = 3000) -> None:
        rows = VALUES[: len(VALUES) // chunk * chunk]
        _, self._states, _ = alone(MODEL, np.tile(rows, (rounds, 1)), None)
        self.covered: set[int] = set()

    def __call__(self, steps: pb.Steps) -> bool:
        numbers = range(steps.first_step, steps.first_step + steps.count)
        self.covered.update(numbers)
        known = self._states[numbers.start : numbers.stop].tobytes()
        return steps.states[: len(known)] == known


@pytest.mark.parametrize("chunk", [1, 6, 13])
async def test_every_chunk_is_answered_with_the_right_states(address: str, chunk: int) -> None:
    expected = Expected(chunk)
    result = await drive(address, chunk_steps=chunk, check=expected)
    assert not result.errors
    assert result.wrong == 0
    assert result.calls == len(result.latencies) > 0
    assert result.latencies.min() > 0
    # A chunk longer than a tick has several answers.
    assert result.messages >= (result.calls * -(-chunk // 4) * 0.5)
    assert expected.covered == set(range(len(expected.covered)))
    assert len(expected.covered) % chunk == 0


async def test_cadence(address: str) -> None:
    """20 sequences, 10 chunks per second each, for one second."""
    result = await drive(address, sequences=20, cadence=0.1, seconds=1, connections=2, check=Expected(6))
    assert not result.errors
    assert result.wrong == 0
    assert abs(result.calls - 200) <= 1


async def test_wrong_states_are_counted(address: str) -> None:
    result = await drive(address, check=lambda steps: steps.first_step > 0)
    assert result.wrong == 5  # the first answer of each sequence
    assert not result.errors


async def test_refused_sequences(address: str) -> None:
    result = await drive(address, model="nobody")
    assert sum(result.errors.values()) == 5
    assert all(reason.startswith("NOT_FOUND: ") for reason in result.errors)
    assert result.calls == 0


@pytest.mark.parametrize("cadence", [None, 0.01])
async def test_drained(start: Callable[..., LocalServer], cadence: float | None) -> None:
    server = start()
    tally = Tally()
    # Without a cadence it is over when all is lost.
    seconds = 30 if cadence is None else 3
    run = asyncio.ensure_future(drive(server.address, cadence=cadence, seconds=seconds, tally=tally))
    await until(lambda: bool(tally.latencies))
    server.drain()
    result = await run
    assert result.errors.pop("closed: DRAINING") == 5
    assert cadence is None or result.errors.pop("not sent") > 0
    assert not result.errors


async def test_broken_off(start: Callable[..., LocalServer]) -> None:
    server = start()
    tally = Tally()
    run = asyncio.ensure_future(drive(server.address, seconds=30, tally=tally))
    await until(lambda: bool(tally.latencies))
    await asyncio.to_thread(server.stop)
    result = await run
    lost = {reason: number for reason, number in result.errors.items() if not reason.startswith("connect: ")}
    assert sum(lost.values()) == 5
    assert result.seconds < 30


class Astray(UnrollServiceServicer):
    """Answers every chunk of 6 steps correctly, except the third one of sequence 1, which it answers with `steps`."""

    def __init__(self, *steps: pb.Steps) -> None:
        self.steps = steps

    async def Unroll(  # noqa: N802 (gRPC's name)
        self, request_iterator: AsyncIterator[pb.UnrollRequest], context: Any
    ) -> AsyncIterator[pb.UnrollResponse]:
        async for request in request_iterator:
            if request.WhichOneof("action") == "open":
                yield pb.UnrollResponse(key=request.key, opened=pb.SequenceOpened(model="m", version=1))
                continue
            first = request.chunk.first_step
            for steps in self.steps if request.key == "1" and first == 12 else ():
                yield pb.UnrollResponse(key=request.key, steps=steps)
            yield pb.UnrollResponse(key=request.key, steps=pb.Steps(first_step=first, count=6))

    async def Classify(self, request: Any, context: Any) -> Any:  # noqa: N802 (gRPC's name)
        raise NotImplementedError

    async def GetModel(self, request: Any, context: Any) -> Any:  # noqa: N802 (gRPC's name)
        raise NotImplementedError

    async def Advance(self, request: Any, context: Any) -> Any:  # noqa: N802 (gRPC's name)
        raise NotImplementedError

    async def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802 (gRPC's name)
        raise NotImplementedError


@pytest.mark.parametrize("cadence", [None, 0.01])
@pytest.mark.parametrize(
    ("first", "count"),
    [(13, 5), (18, 6), (6, 6), (6, 12), (0, 18), (12, 0), (12, 6000), (2**40, 1)],
    ids=["gap", "ahead", "again", "overlap", "all again", "nothing", "too much", "far away"],
)
async def test_steps_that_do_not_follow(
    script: Callable[[UnrollServiceServicer], str], cadence: float | None, first: int, count: int
) -> None:
    address = script(Astray(pb.Steps(first_step=first, count=count)))
    result = await drive(address, sequences=3, cadence=cadence, warm_up=0, seconds=1)
    # The sequence is lost once, whatever its later answers; the others continue.
    lost = {reason: number for reason, number in result.errors.items() if reason != "not sent"}
    assert lost == {"steps that were not asked for": 1}
    assert result.wrong == 1
    assert result.calls > 10
    assert ("not sent" in result.errors) == (cadence is not None)


class Silent(Astray):
    """Opens sequences and answers nothing else."""

    async def Unroll(  # noqa: N802 (gRPC's name)
        self, request_iterator: AsyncIterator[pb.UnrollRequest], context: Any
    ) -> AsyncIterator[pb.UnrollResponse]:
        async for request in request_iterator:
            if request.WhichOneof("action") == "open":
                yield pb.UnrollResponse(key=request.key, opened=pb.SequenceOpened(model="m", version=1))
        await asyncio.Event().wait()


async def test_what_is_never_answered_is_counted_once(
    script: Callable[[UnrollServiceServicer], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "PATIENCE", 0.5)
    result = await drive(script(Silent()), sequences=3, streams=2, warm_up=0, seconds=0.2)
    assert result.errors == {"unanswered": 3, "streams that did not end": 2}
    assert result.calls == 0


@pytest.mark.parametrize("bad", [{"chunk_steps": 14}, {"streams": 6}, {"sequences": 0}, {"cadence": 0}, {"seconds": 0}])
async def test_arguments(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        await drive("127.0.0.1:1", **bad)


def answer(rows: list[list[float]], **changes: Any) -> bytes:
    array = np.array(rows, "<f4")
    scores = array if array.shape[1] > 1 else np.concatenate([0 * array, array], axis=1)
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    fields: dict[str, Any] = {
        "logits": array.tobytes(),
        "probabilities": probabilities.astype("<f4").tobytes(),
        "label_indices": scores.argmax(axis=1).tolist(),
        "labels": ["x"] * len(array),
    }
    return pb.ClassifyResponse(**(fields | changes)).SerializeToString()


GOOD = [[1.0, 2.0, 0.5], [0.0, -1.0, -2.0]]


@pytest.mark.parametrize(
    "wrong",
    [
        answer(GOOD, label_indices=[1, 1]),
        answer(GOOD, labels=["x"]),
        answer(GOOD, logits=b"1234"),
        answer(GOOD, probabilities=np.full((2, 3), 0.3, "<f4").tobytes()),
        answer(GOOD[:1]),
        answer([[np.nan, 1, 2], GOOD[1]]),
        b"\xff",
        b"",
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_wrong_answers_to_classify(wrong: bytes, first: bool) -> None:
    check = ClassifyCheck(2, 3, bitwise=True)
    assert first or check(answer(GOOD))
    assert not check(wrong)


def test_answers_must_stay_the_same() -> None:
    changed = [[float(np.nextafter(np.float32(1), np.float32(2))), 2.0, 0.5], GOOD[1]]
    far = [[1.001, 2.0, 0.5], GOOD[1]]
    exact, close = ClassifyCheck(2, 3, bitwise=True), ClassifyCheck(2, 3, bitwise=False)
    assert [exact(answer(logits)) for logits in (GOOD, GOOD, changed, far)] == [True, True, False, False]
    assert [close(answer(logits)) for logits in (GOOD, GOOD, changed, far)] == [True, True, True, False]
    # Other fields than the logits may change, such as the label's name.
    assert exact(answer(GOOD, labels=["y", "z"]))


def test_binary_answers() -> None:
    check = ClassifyCheck(3, 1, bitwise=True)
    assert check(answer([[1.0], [-1.0], [0.0]]))
    assert not ClassifyCheck(1, 1, bitwise=True)(answer([[1.0]], label_indices=[0]))


def states(first: int, *rows: float) -> pb.Steps:
    values = np.repeat(np.array(rows, "<f4"), 2)
    return pb.Steps(first_step=first, count=len(rows), states=values.tobytes())


def test_steps_are_compared_wherever_they_are_cut() -> None:
    check = StepsCheck(2, bitwise=True)
    assert check(states(0, 1, 2, 3))
    assert check(states(0, 1))
    assert check(states(1, 2, 3, 4))
    assert not check(states(3, 5))
    assert not check(states(4, np.inf))
    assert not check(pb.Steps(first_step=5, count=2, states=bytes(8)))
    close = StepsCheck(2, bitwise=False)
    assert [close(states(0, value)) for value in (1, 1 + 1e-6, 1.1)] == [True, True, False]
