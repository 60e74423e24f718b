"""One call of ModelStreamInfer: reading ahead, errors, cancellation, drains."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from support.processes import PATIENCE
from support.streams import answers_of

from unroll_engine.errors import OverloadedError
from unroll_proto.inference import service_pb2 as pb
from unroll_server.api.oip.stream import MAX_BYTES, MAX_UNANSWERED, InferenceStream
from unroll_server.errors import DrainingError


def requests_of(count: int, size: int = 0) -> list[pb.ModelInferRequest]:
    return [pb.ModelInferRequest(id=str(index), raw_input_contents=[bytes(size)]) for index in range(count)]


class Caller:
    """Sends requests on demand; `sent` counts them."""

    def __init__(self, requests: list[pb.ModelInferRequest], half_closes: bool = True) -> None:
        self.sent = 0
        self._requests = requests
        self._half_closes = half_closes

    async def requests(self) -> AsyncIterator[pb.ModelInferRequest]:
        for request in self._requests:
            self.sent += 1
            yield request
        if not self._half_closes:
            await asyncio.Event().wait()


async def echo(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    return pb.ModelInferResponse(id=request.id, raw_output_contents=request.raw_input_contents)


def unexpected(error: Exception) -> None:
    raise AssertionError(error)


async def settle() -> None:
    """Runs the event loop until nothing can proceed without the test."""
    for _ in range(20 * MAX_UNANSWERED):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("size", "most"), [(0, MAX_UNANSWERED), (MAX_BYTES // 4, 4)], ids=["by their number", "by their bytes"]
)
async def test_a_slow_reader_s_requests_are_not_read_far_ahead(size: int, most: int) -> None:
    count = most + 40 if not size else most + 4
    caller = Caller(requests_of(count, size))
    responses = answers_of(InferenceStream(echo, unexpected), caller.requests())
    ids = [(await anext(responses)).infer_response.id]
    await settle()
    # A yielded answer counts until the next one is requested.
    assert caller.sent <= most + 2
    ids += [response.infer_response.id async for response in responses]
    assert ids == [str(index) for index in range(count)]


@pytest.mark.parametrize("sequence", ["", "s"])
async def test_the_first_error_ends_a_stream_that_asks_for_it_after_the_answers_before_it(sequence: str) -> None:
    begun: list[str] = []

    async def answer(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        begun.append(request.id)
        if request.id == "2":
            raise OverloadedError("the queue is full", 1.0)
        return await echo(request)

    requests = requests_of(6)
    for request in requests:
        request.parameters["sequence_id"].string_param = sequence
    stream = InferenceStream(answer, unexpected, first_error_ends=True)
    responses = answers_of(stream, Caller(requests).requests())
    assert [(await anext(responses)).infer_response.id for _ in range(2)] == ["0", "1"]
    with pytest.raises(OverloadedError, match="the queue is full"):
        await anext(responses)
    if sequence:
        assert begun == ["0", "1", "2"], "a sequence must not move on behind a chunk that failed"


async def test_a_fault_of_the_server_fails_one_request_and_is_reported() -> None:
    told: list[Exception] = []

    async def answer(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        if request.id == "1":
            raise ValueError("a bug")
        if request.id == "2":
            raise OverloadedError("the queue is full", 1.0)
        return await echo(request)

    stream = InferenceStream(answer, told.append)
    responses = [response async for response in answers_of(stream, Caller(requests_of(4)).requests())]
    assert [response.infer_response.id for response in responses] == ["0", "1", "2", "3"]
    assert [response.error_message for response in responses] == [
        "",
        "the server failed; its log has the cause",
        "the queue is full",
        "",
    ]
    assert [str(error) for error in told] == ["a bug"]


async def test_requests_of_a_caller_who_leaves_are_cancelled() -> None:
    cancelled = []

    async def answer(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        if request.id == "0":
            return await echo(request)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(request.id)
            raise
        raise AssertionError

    responses = answers_of(InferenceStream(answer, unexpected), Caller(requests_of(3), half_closes=False).requests())
    assert (await anext(responses)).infer_response.id == "0"
    await settle()
    await responses.aclose()
    assert sorted(cancelled) == ["1", "2"]


async def test_a_drain_answers_what_was_read_before_it_ends_the_call() -> None:
    gate = asyncio.Event()

    async def answer(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        await gate.wait()
        return await echo(request)

    stream = InferenceStream(answer, unexpected)
    responses = answers_of(stream, Caller(requests_of(2), half_closes=False).requests())
    first = asyncio.ensure_future(anext(responses))
    await settle()
    stream.drain(half_close_timeout=0.0)
    gate.set()
    assert [(await first).infer_response.id, (await anext(responses)).infer_response.id] == ["0", "1"]
    with pytest.raises(DrainingError):
        await anext(responses)


async def test_a_request_that_comes_during_a_drain_is_refused_with_its_stream() -> None:
    stream = InferenceStream(echo, unexpected)
    stream.drain(half_close_timeout=PATIENCE)
    with pytest.raises(DrainingError, match="has not run all of this stream"):
        await anext(answers_of(stream, Caller(requests_of(2)).requests()))
