"""The pipeline: everything once and in order, in bounded batches, without reading far ahead."""

import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import aclosing
from itertools import islice
from typing import Any

import numpy as np
import pytest
from support.servicers import PartialServicer, zero_answer
from unit.client.harness import LIMITS, MODEL, STEEP, LocalServer

from unroll_client import AsyncClient, Unavailable
from unroll_client.cli import pipeline
from unroll_client.cli.backends import Backend, ServerBackend
from unroll_client.cli.pipeline import Input, Position, classified
from unroll_proto.sequences import Block, Columns, Sequence, SequenceError, Source
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceServicer


class Given(Input):
    """Sequences in blocks of a fixed size, as of a file."""

    def __init__(self, sequences: Iterable[Sequence], size: int) -> None:
        super().__init__([Source("file.parquet")], Columns())
        self._rest, self._size = iter(sequences), size

    def blocks(self, backend: Backend, begin: Position) -> Iterator[tuple[Block, Position]]:
        while some := list(islice(self._rest, self._size)):
            yield Block.of(some), Position()


def numbered(lengths: list[int], features: int = 3) -> Iterator[Sequence]:
    rng = np.random.default_rng(0)
    for index, length in enumerate(lengths):
        values = rng.normal(size=(length, features)).astype(np.float32)
        yield Sequence(str(index), values, f"label {index}", None, index + 1)


async def test_results_come_in_order_and_the_file_is_read_as_needed(address: str) -> None:
    taken = 0

    def watched() -> Iterator[Sequence]:
        nonlocal taken
        for sequence in numbered([1 + index % 40 for index in range(200)]):
            taken += 1
            yield sequence

    seen: list[str] = []
    async with AsyncClient(address) as client:
        model = await client.model("m")
        expected = await client.classify([sequence.values for sequence in numbered([9] * 5)], model="m")
        backend = ServerBackend(client, model, wait=0)
        async for block, result, _ in classified(backend, Given(watched(), 5)):
            # One block ahead in the reader, the others in flight.
            assert taken <= len(seen) + 5 * (pipeline.IN_FLIGHT + 1)
            assert result is not None
            assert len(result) == len(block) == 5
            seen += block.ids
        async for _, result, _ in classified(backend, Given(numbered([9] * 5), 5)):
            assert result is not None
            assert result.logits.tobytes() == expected.logits.tobytes()
    assert seen == [str(index) for index in range(200)]


class Zeros(PartialServicer):
    """Answers zeros at once."""

    async def Classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:  # noqa: N802
        return zero_answer(["a"] * len(request.lengths), classes=1)

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
        limits = pb.Limits(max_sequences=10_000, max_steps=10_000, max_message_bytes=4_000_000)
        model = pb.Model(name="m", version=1, input_size=3, output_size=1, class_labels=["a"], limits=limits)
        return pb.GetModelResponse(model=model)


async def test_memory_does_not_grow_with_the_file(script: Callable[[UnrollServiceServicer], str]) -> None:
    count = 0
    async with AsyncClient(script(Zeros())) as client:
        model = await client.model()
        # 200 MB of values, 2 MiB a batch.
        source = Given((Sequence(str(index), np.ones((2000, 3), np.float32)) for index in range(8000)), 85)
        tracemalloc.start()
        try:
            async for block, _, _ in classified(ServerBackend(client, model, wait=0), source):
                count += len(block)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert count == 8000
    assert peak < 60e6


@pytest.mark.parametrize("steps", [5, LIMITS.max_steps + 5])
async def test_what_the_server_refuses_is_named_by_its_row(start: Callable[..., LocalServer], steps: int) -> None:
    sequences = list(numbered([5] * 10 + [steps] + [5] * 3))
    sequences[10].values[-1] = 3e38
    async with AsyncClient(start(STEEP).address) as client:
        with pytest.raises(SequenceError, match=r"file\.parquet: row 11: column 'sequence': values are so large that"):
            await drained(client, iter(sequences))


async def drained(client: AsyncClient, sequences: Iterator[Sequence]) -> None:
    backend = ServerBackend(client, await client.model("m"), wait=0)
    async with aclosing(classified(backend, Given(sequences, 4))) as results:
        async for _ in results:
            pass


async def test_a_bad_row_ends_it(address: str) -> None:
    def broken() -> Iterator[Sequence]:
        yield from numbered([5] * 30)
        raise SequenceError("file.parquet", "no good", row=31)

    async with AsyncClient(address) as client:
        with pytest.raises(SequenceError, match="row 31: no good"):
            await drained(client, broken())


async def test_a_server_that_goes_away_ends_it(start: Callable[..., LocalServer]) -> None:
    server = start(MODEL)

    def stopping() -> Iterator[Sequence]:
        yield from numbered([5] * 40)
        server.stop()
        yield from numbered([5] * 40)

    async with AsyncClient(server.address) as client:
        with pytest.raises(Unavailable):
            await drained(client, stopping())
