"""One call of ModelStreamInfer: sequences share a stream, each is answered in order, and none waits for another."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

from unroll_engine.errors import InternalError, RequestError
from unroll_proto.inference import service_pb2 as pb
from unroll_server.api.streams import RequestStream
from unroll_server.status import status_of

MAX_UNANSWERED = 256
"""Most requests of one stream that are read and not yet answered; beyond it the stream is not read."""
MAX_BYTES = 2**26
"""Most bytes of those requests and their answers, computed or expected; one request may exceed it."""
FINAL = "triton_final_response"
"""Parameter that marks the last response to a request; here every response is the last one."""
STATUS_FLAG = "triton_grpc_error"
"""Metadata of a call, by Triton's name: `true` ends the stream at its first error, with that error's status."""

Expected = Callable[[pb.ModelInferRequest], int]
Answer = Callable[[pb.ModelInferRequest], Awaitable[pb.ModelInferResponse]]


class _Key(NamedTuple):
    """Key of requests that are answered in order: those of one sequence, or those of none."""

    model: str
    sequence: int | str


class InferenceStream(RequestStream):
    """Answers the requests of one call.

    Args:
        answer: Answers a request.
        on_failure: Called with any other error than a RequestError: a fault of the server.
        expected: Returns the bytes that the answer to a request may have.
        first_error_ends: True if an error ends the stream, instead of being the answer to its request.
    """

    def __init__(
        self,
        answer: Answer,
        on_failure: Callable[[Exception], None],
        expected: Expected = lambda _: 0,
        first_error_ends: bool = False,
    ) -> None:
        super().__init__()
        self._answer = answer
        self._on_failure = on_failure
        self._expected = expected
        self._first_error_ends = first_error_ends
        # Ends the stream once the earlier answers are taken.
        self._error: RequestError | None = None
        self._latest: dict[_Key, asyncio.Task[None]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._out: deque[pb.ModelStreamInferResponse] = deque()
        self._requested = 0
        # Each event is set whenever its condition may have changed.
        self._written = asyncio.Event()
        self._taken = asyncio.Event()
        # True if the server drained before it ran some request.
        self._skipped = False
        self._bytes = 0

    async def run(
        self,
        requests: AsyncIterator[pb.ModelInferRequest],
        write: Callable[[pb.ModelStreamInferResponse], Awaitable[None]],
    ) -> None:
        """See RequestStream.

        Raises:
            DrainingError: the stream drained after it answered all accepted requests.
            RequestError: a request failed, and the first error ends the stream.
        """
        serving = asyncio.create_task(self.serve(requests))
        serving.add_done_callback(lambda _: self._written.set())
        try:
            while True:
                while self._out:
                    response = self._out.popleft()
                    self._bytes -= response.ByteSize()
                    self._requested -= 1
                    await write(response)
                    self._taken.set()
                if self._error:
                    raise self._error
                if serving.done():
                    break
                self._written.clear()
                await self._written.wait()
            serving.result()
        finally:
            serving.cancel()
            for task in self._running:
                task.cancel()
            await asyncio.gather(serving, *self._running, return_exceptions=True)

    async def all_answered(self) -> None:
        """See RequestStream."""
        while self._running:
            await asyncio.wait(self._running)

    def is_complete(self, half_closed: bool) -> bool:
        """See RequestStream."""
        return half_closed and not self._skipped

    async def read(self, requests: AsyncIterator[pb.ModelInferRequest]) -> None:
        """See RequestStream."""
        async for request in requests:
            if self.draining.is_set() or self._error:
                self._skipped = True
                continue
            self._begin(request)
            while self._requested >= MAX_UNANSWERED or self._bytes >= MAX_BYTES:
                self._taken.clear()
                await self._taken.wait()

    def _begin(self, request: pb.ModelInferRequest) -> None:
        key = _key(request)
        before = self._latest.get(key)
        self._requested += 1
        size = request.ByteSize() + self._expected(request)
        self._bytes += size
        task = asyncio.create_task(self._serve(request, key, before, size))
        self._latest[key] = task
        self._running.add(task)
        task.add_done_callback(lambda done: self._forget(key, done))

    def _forget(self, key: _Key, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if self._latest.get(key) is task:
            del self._latest[key]

    async def _serve(
        self, request: pb.ModelInferRequest, key: _Key, before: asyncio.Task[None] | None, size: int
    ) -> None:
        # Requests without a sequence run at once and are answered in order, since they may have no ids.
        if before and key.sequence:
            await asyncio.wait({before})
            if self._error:
                return
        failure: RequestError | None = None
        try:
            response = pb.ModelStreamInferResponse(infer_response=await self._answer(request))
        except RequestError as error:
            failure = error
        except Exception as error:
            self._on_failure(error)
            failure = InternalError("the server failed; its log has the cause")
        if failure:
            response = _failure(request, failure)
        response.infer_response.parameters[FINAL].bool_param = True
        if before and not key.sequence:
            await asyncio.wait({before})
        if self._error:
            return
        if failure and self._first_error_ends:
            self._error = failure
            self._written.set()
            return
        self._bytes += response.ByteSize() - size
        self._out.append(response)
        self._written.set()


def _failure(request: pb.ModelInferRequest, error: RequestError) -> pb.ModelStreamInferResponse:
    return pb.ModelStreamInferResponse(
        error_message=status_of(error).message, infer_response=pb.ModelInferResponse(id=request.id)
    )


def _key(request: pb.ModelInferRequest) -> _Key:
    """Returns the key of a request; any key for a malformed one, which may be refused in any order."""
    parameter = request.parameters.get("sequence_id")
    if parameter is None:
        return _Key("", "")
    return _Key(request.model_name, parameter.string_param or parameter.int64_param or parameter.uint64_param)
