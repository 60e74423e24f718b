"""unroll against servers that answer wrongly, late, or not at all."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from support.processes import PATIENCE
from support.servicers import PartialServicer

from unroll_client import AsyncClient, AsyncSequence, DeadlineExceeded, Internal, Unavailable
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceServicer

SNAPSHOT = pb.Snapshot(format=1, model="m", version=1, state=[b"\0\0\0\0"])


def ones(steps: int) -> Any:
    return np.ones((steps, 3))


class Scripted(PartialServicer):
    """Opens sequences, and answers their chunks by `answer`."""

    def __init__(self, answer: Callable[[pb.Chunk], list[pb.UnrollResponse]]) -> None:
        self.answer = answer

    async def Unroll(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.UnrollRequest], context: Any
    ) -> AsyncIterator[pb.UnrollResponse]:
        async for request in request_iterator:
            if request.WhichOneof("action") == "open":
                yield pb.UnrollResponse(key=request.key, opened=pb.SequenceOpened(model="m", version=1))
            elif request.WhichOneof("action") == "chunk":
                for response in self.answer(request.chunk):
                    response.key = request.key
                    yield response
            elif request.WhichOneof("action") == "close":
                closed = pb.SequenceClosed(reason=pb.SequenceClosed.REASON_CLOSED, snapshot=SNAPSHOT)
                yield pb.UnrollResponse(key=request.key, closed=closed)

    async def GetModel(self, request: Any, context: Any) -> pb.GetModelResponse:  # noqa: N802
        return pb.GetModelResponse(model=pb.Model(name="m", version=1, input_size=3, hidden_size=1, num_layers=1))


def steps(first: int, count: int, numbers: int) -> pb.UnrollResponse:
    states = np.zeros(numbers, "<f4").tobytes()
    return pb.UnrollResponse(steps=pb.Steps(first_step=first, count=count, states=states))


@pytest.mark.parametrize(
    "answers",
    [
        [steps(0, 2, 3)],
        [steps(1, 2, 2)],
        [steps(0, 3, 3)],
        [steps(0, 0, 0)],
        [steps(0, 2, 1)],
        [steps(0, 1, 1), steps(0, 1, 1)],
        [pb.UnrollResponse(snapshot=pb.Snapshot())],
        [pb.UnrollResponse(opened=pb.SequenceOpened())],
        [pb.UnrollResponse()],
        [pb.UnrollResponse(closed=pb.SequenceClosed(reason=pb.SequenceClosed.REASON_DRAINING))],
    ],
    ids=str,
)
async def test_an_answer_that_cannot_be_is_internal(
    script: Callable[[UnrollServiceServicer], str], answers: list[pb.UnrollResponse]
) -> None:
    address = script(Scripted(lambda chunk: answers if len(chunk.values) == 24 else [steps(chunk.first_step, 1, 1)]))
    async with AsyncClient(address) as client, client.unroll() as bad, client.unroll() as good:
        with pytest.raises(Internal):
            await bad.send(ones(2))
        assert (await good.send(ones(1))).count == 1


async def test_a_server_that_knows_no_batches_gets_none(script: Callable[[UnrollServiceServicer], str]) -> None:
    """The scripted servicer answers only single chunks."""
    address = script(Scripted(lambda chunk: [steps(chunk.first_step, 1, 1)]))
    async with AsyncClient(address, timeout=PATIENCE) as client:
        sequences = await asyncio.gather(*(client.unroll().open() for _ in range(20)))
        answers = await asyncio.gather(*(sequence.send(ones(1)) for sequence in sequences))
        await asyncio.gather(*(sequence.close() for sequence in sequences))
    assert [answer.count for answer in answers] == [1] * 20


async def test_a_batch_of_answers_that_cannot_be_is_internal(script: Callable[[UnrollServiceServicer], str]) -> None:
    batch = pb.StepsBatch(keys=["1", "2"], first_steps=[0], counts=[1, 1], states=[b"", b""], logits=[b"", b""])
    address = script(Scripted(lambda chunk: [pb.UnrollResponse(steps_batch=batch)]))
    async with AsyncClient(address, reconnect_timeout=0) as client, client.unroll() as sequence:
        with pytest.raises(Internal, match="steps_batch"):
            await sequence.send(ones(1))


async def test_an_answer_that_does_not_come(script: Callable[[UnrollServiceServicer], str]) -> None:
    answers: dict[int, list[pb.UnrollResponse]] = {0: [], 1: [steps(0, 1, 1), steps(1, 1, 1)]}
    address = script(Scripted(lambda chunk: answers[chunk.first_step]))
    async with AsyncClient(address, timeout=1) as client:
        sequence = await client.unroll().open()
        with pytest.raises(DeadlineExceeded, match=r"no 'steps' within 1 s"):
            await sequence.send(ones(1))
        # Its late answer does not mix with the next one.
        assert (await sequence.send(ones(1))).first_step == 1


async def test_a_server_that_ends_the_stream(script: Callable[[UnrollServiceServicer], str]) -> None:
    class Ending(Scripted):
        async def Unroll(  # noqa: N802
            self, request_iterator: AsyncIterator[pb.UnrollRequest], context: Any
        ) -> AsyncIterator[pb.UnrollResponse]:
            request = await anext(request_iterator)
            yield pb.UnrollResponse(key=request.key, opened=pb.SequenceOpened(model="m", version=1))
            await anext(request_iterator)

    async with AsyncClient(script(Ending(lambda _: [])), reconnect_timeout=0) as client:
        sequence: AsyncSequence = await client.unroll().open()
        with pytest.raises(Unavailable, match="the server ended the stream"):
            await sequence.send(ones(1))
        assert (await client.unroll().open()).step == 0
