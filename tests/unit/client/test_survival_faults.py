"""Sequences that resume on servers that refuse, repeat, hang or crash."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from support.waiting import until
from unit.client.test_stream_faults import Scripted, ones, steps

from unroll_client import AsyncClient, Internal, PermissionDenied, ResourceExhausted, Unavailable
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceServicer

Script = Callable[[UnrollServiceServicer], str]


def refusal(code: int, seconds: float | None = None) -> pb.UnrollResponse:
    status = status_pb2.Status(code=code, message="no")
    if seconds is not None:
        delay = Duration(nanos=int(seconds * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return pb.UnrollResponse(error=status)


class Rounds(Scripted):
    """Answers the chunks of each stream by the script of its round.

    Args:
        rounds: Answers to the chunks of each stream; None ends it. Later streams use the last round.
    """

    def __init__(self, *rounds: list[list[pb.UnrollResponse] | None]) -> None:
        super().__init__(lambda _: [])
        self.rounds = rounds
        self.streams = 0
        self.openings: list[pb.OpenSequence] = []
        self.chunks: list[list[tuple[int, int]]] = []

    async def Unroll(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.UnrollRequest], context: Any
    ) -> AsyncIterator[pb.UnrollResponse]:
        answers = iter(self.rounds[min(self.streams, len(self.rounds) - 1)])
        self.streams += 1
        chunks: list[tuple[int, int]] = []
        self.chunks.append(chunks)
        async for request in request_iterator:
            if request.HasField("open"):
                self.openings.append(request.open)
                opened = pb.SequenceOpened(model="m", version=1, step=request.open.initial_state.step)
                yield pb.UnrollResponse(key=request.key, opened=opened)
            elif request.HasField("chunk"):
                chunks.append((request.chunk.first_step, len(request.chunk.values) // 12))
                responses = next(answers)
                if responses is None:
                    return
                for response in responses:
                    yield pb.UnrollResponse(key=request.key, **{event(response): getattr(response, event(response))})


def event(response: pb.UnrollResponse) -> str:
    name = response.WhichOneof("event")
    assert name is not None
    return name


async def test_what_was_answered_in_part_goes_on_where_it_broke_off(script: Script) -> None:
    servicer = Rounds(
        [[steps(0, 2, 2)], [steps(2, 1, 1)], None],
        # The same with other cuts: one piece begins with known steps.
        [[steps(0, 2, 2)], [steps(2, 2, 2), steps(4, 3, 3)], [steps(7, 1, 1)]],
    )
    async with AsyncClient(script(servicer)) as client:
        sequence = client.unroll()
        answers = await asyncio.gather(*(sequence.send(ones(count)) for count in (2, 5, 1)))
    assert [(answer.first_step, answer.steps.tolist()) for answer in answers] == [
        (0, [0, 1]),
        (2, [2, 3, 4, 5, 6]),
        (7, [7]),
    ]
    assert servicer.chunks == [[(0, 2), (2, 5), (7, 1)]] * 2
    # It is opened again on its version.
    assert [(opening.model, opening.version) for opening in servicer.openings] == [("", 0), ("m", 1)]


@pytest.mark.parametrize("code", [code_pb2.RESOURCE_EXHAUSTED, code_pb2.UNAVAILABLE])
async def test_a_server_without_room_for_what_another_had_taken_is_asked_again(script: Script, code: int) -> None:
    answered = [steps(0, 2, 2)]
    full, gap = refusal(code, 0.01), refusal(code_pb2.FAILED_PRECONDITION)
    servicer = Rounds(
        [answered, None],
        # Both chunks are repeated at each of three openings; after a refused one there is a gap.
        [[full], [gap], answered, [full], answered, [steps(2, 1, 1)]],
    )
    async with AsyncClient(script(servicer)) as client:
        sequence = client.unroll()
        assert (await sequence.send(ones(2))).count == 2
        assert (await sequence.send(ones(1))).steps.tolist() == [2]
    assert servicer.streams == 2
    assert len(servicer.openings) == 4


async def test_a_new_chunk_is_refused_as_ever(script: Script) -> None:
    servicer = Rounds([[refusal(code_pb2.RESOURCE_EXHAUSTED, 0.01)], [steps(0, 1, 1)]])
    async with AsyncClient(script(servicer)) as client:
        sequence = client.unroll()
        with pytest.raises(ResourceExhausted):
            await sequence.send(ones(1))
        assert (await sequence.send(ones(1))).first_step == 0


async def test_a_chunk_that_ends_every_server_is_given_up(script: Script) -> None:
    servicer = Rounds([[steps(0, 1, 1)], None])
    async with AsyncClient(script(servicer), reconnect_timeout=1) as client:
        sequence = client.unroll()
        await sequence.send(ones(1))
        with pytest.raises(Unavailable, match="the server ended the stream"):
            await sequence.send(ones(2))
    # It was retried in growing intervals; otherwise there would be hundreds of streams.
    assert 2 < servicer.streams < 15


async def test_a_refusal_that_no_other_try_can_cure_is_told_at_once(script: Script) -> None:
    servicer = Rounds([[steps(0, 1, 1)], None], [[refusal(code_pb2.PERMISSION_DENIED)]])
    async with AsyncClient(script(servicer)) as client:
        sequence = client.unroll()
        await sequence.send(ones(1))
        with pytest.raises(PermissionDenied):
            await sequence.send(ones(2))
    assert servicer.streams == 2


async def test_a_server_that_opens_something_else_is_not_trusted(script: Script) -> None:
    class Other(Rounds):
        async def Unroll(  # noqa: N802
            self, request_iterator: AsyncIterator[pb.UnrollRequest], context: Any
        ) -> AsyncIterator[pb.UnrollResponse]:
            async for response in super().Unroll(request_iterator, context):
                if response.HasField("opened") and self.streams > 1:
                    response.opened.version = 2
                yield response

    async with AsyncClient(script(Other([[steps(0, 1, 1)], None]))) as client:
        sequence = client.unroll()
        await sequence.send(ones(1))
        with pytest.raises(Internal, match="another sequence"):
            await sequence.send(ones(2))


async def test_a_server_that_hangs_is_left_for_another(script: Script) -> None:
    class Hanging(Rounds):
        left = threading.Event()

        async def Unroll(  # noqa: N802
            self, request_iterator: AsyncIterator[pb.UnrollRequest], context: Any
        ) -> AsyncIterator[pb.UnrollResponse]:
            if self.streams == 1:
                self.streams += 1
                try:
                    await asyncio.Event().wait()
                finally:
                    self.left.set()
            async for response in super().Unroll(request_iterator, context):
                yield response

    servicer = Hanging([[steps(0, 1, 1)], None], [], [[steps(0, 1, 1)], [steps(1, 2, 2)]])
    async with AsyncClient(script(servicer)) as client:
        sequence = client.unroll()
        await sequence.send(ones(1))
        assert (await sequence.send(ones(2))).steps.tolist() == [1, 2]
        # The stream that hung is released.
        await until(servicer.left.is_set)
    assert servicer.streams == 3


async def test_the_wait_for_a_server_is_bounded_by_the_timeout_too(script: Script) -> None:
    servicer = Rounds([[steps(0, 1, 1)], None])
    async with AsyncClient(script(servicer), timeout=0.5) as client:
        sequence = client.unroll()
        await sequence.send(ones(1))
        with pytest.raises(TimeoutError):
            await sequence.send(ones(2))
        with pytest.raises(TimeoutError):
            await sequence.send(np.ones((1, 3)))
