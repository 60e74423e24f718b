"""AsyncClient: the one body of code behind both clients."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from collections.abc import Sequence as Listing
from contextlib import suppress
from dataclasses import replace
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from numpy.typing import ArrayLike

from unroll_client._arrays import check_number, pack_chunk
from unroll_client._calls import Calls
from unroll_client._channel import Connection, targets_of
from unroll_client._classify import Batch, classify
from unroll_client._coalesce import Coalescer
from unroll_client._errors import InvalidArgument, NotFound, UnrollError
from unroll_client._models import Models
from unroll_client._proxy import explained
from unroll_client._sequence import AsyncSequence
from unroll_client._sessions import SessionSteps, advance_request, joined_steps, piece_request, pieces, session_steps
from unroll_client._stream import SharedStream
from unroll_client._tracing import traced_stream
from unroll_client._types import Classification, Limits, ModelInfo
from unroll_client._uncopied import Uncopied
from unroll_proto.snapshot import Snapshot
from unroll_proto.v1 import unroll_pb2 as pb

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_TARGET = "localhost:50051"
DEFAULT_TIMEOUT = 30.0
DEFAULT_RECONNECT_TIMEOUT = 30.0


def _explaining(
    method: Callable[Concatenate[AsyncClient, P], Awaitable[T]],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    """Has a method's errors name the proxy that is in between."""

    @wraps(method)
    async def explaining(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(self, *args, **kwargs)
        except UnrollError as error:
            raise self.explained(error) from error.__cause__

    return explaining


class AsyncClient(Uncopied):
    """Calls Unroll servers, on one asyncio event loop; an async context manager.

    The connection is made by the first call. Calls that change nothing on the server (all but streams) are tried
    again, with growing pauses, if a server is unreachable or asks to retry.

    Args:
        target: "host:port", or any gRPC target; several of them in a list, or with commas between. Calls go to those
            that are alive, in turn. A name with several addresses is balanced over all of them.
        model: The model for calls that name none; "" stands for the only one that is served.
        timeout: Seconds that a call may take in all, with its retries; of a stream, the wait for one answer.
            `math.inf` for no limit.
        reconnect_timeout: Seconds in which a sequence that lost its server must get on elsewhere, or fail with its
            last snapshot. 0: it fails at once, and nothing is kept to be sent again.
        wait_for_ready: Wait for a server within the timeout, rather than fail while there is none.
        coalesce: Let small `classify` calls of the same moment share a request. Each gets the result or the error
            that it would have got alone, with the same bits; without, each is an RPC of its own.
        tls: Encrypt, trusting the system's authorities; also implied by the next two.
        root_certificates: PEM of the authorities to trust instead.
        certificate: PEM of the client's own certificate chain and key, for mutual TLS.
        server_name: Name to expect in the server's certificate, if it is not the target's host.
        token: Sent as a bearer token with every call.
        metadata: Further metadata of every call, as pairs.

    Raises:
        ValueError: an address is missing, or the token or the metadata can't be sent.
    """

    def __init__(
        self,
        target: str | Listing[str] = DEFAULT_TARGET,
        *,
        model: str = "",
        timeout: float = DEFAULT_TIMEOUT,
        reconnect_timeout: float = DEFAULT_RECONNECT_TIMEOUT,
        wait_for_ready: bool = False,
        coalesce: bool = True,
        tls: bool = False,
        root_certificates: bytes | None = None,
        certificate: tuple[bytes, bytes] | None = None,
        server_name: str | None = None,
        token: str | None = None,
        metadata: Listing[tuple[str, str]] = (),
    ) -> None:
        connection = Connection(
            targets_of(target), tls, root_certificates, certificate, server_name, token, tuple(metadata)
        )
        self._targets = connection.targets
        self._calls = Calls(connection, timeout, wait_for_ready)
        self._model = model
        self._reconnect_timeout = reconnect_timeout
        self._streams: list[SharedStream] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._models = Models(self._look_up)
        self._coalescer = Coalescer(self._classify_once, self._models.forget) if coalesce else None

    @_explaining
    async def classify(
        self,
        sequences: Listing[ArrayLike],
        *,
        model: str | None = None,
        version: int = 0,
        initial_states: Listing[Snapshot | None] | None = None,
        return_final_states: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 (the deadline that the server is told)
    ) -> Classification:
        """Classifies sequences, each from the logits of its own last timestep.

        What is over the server's limits for one RPC goes as several. A sequence that is too long goes in pieces, with
        the bits of the whole. Small calls of the same moment share an RPC.

        Args:
            sequences: Arrays [steps, features] of numbers, of any lengths, of NumPy or any library that it can read.
                They are sent as float32: floats are rounded, integers must be exact. No sequence gives an empty result.
            model: Model name; the client's where absent.
            version: Model version; 0 picks the newest.
            initial_states: One a sequence: a snapshot to go on from, or None for the zero state.
            return_final_states: Also give each sequence's state after its last timestep.
            timeout: Seconds in all; the client's where absent.

        Returns:
            One label, row of probabilities and row of logits a sequence, in their order.

        Raises:
            InvalidArgument: a sequence can't be used or is over a limit; `fields` names it.
            NotFound: no such model or version.
            FailedPrecondition: a snapshot is of another model or version.
            DeadlineExceeded, ResourceExhausted, Unavailable, UnrollError: as they say.
        """
        deadline = self._calls.deadline(timeout)
        name = self._model if model is None else model
        batch = Batch.make(sequences, initial_states, return_final_states)
        info = self._models.get(name, version) or await self._models.find(name, version, deadline)
        try:
            if self._coalescer is not None and self._coalescer.takes(batch, info):
                result = await self._coalescer.classify(batch, name, version, info, deadline)
            else:
                result = await classify(batch, name, version, info, partial(self._classify_in_time, deadline))
        except (InvalidArgument, NotFound) as error:
            # What is remembered of the model may be what is wrong.
            self._models.forget()
            batch.explain(error, info)
            raise
        return result if result.version == info.version else await self._of_another_version(result, info, deadline)

    def unroll(
        self,
        model: str | None = None,
        *,
        version: int = 0,
        snapshot: Snapshot | None = None,
        states: bool = True,
        logits: bool = False,
        every: int = 1,
        timeout: float | None = None,
    ) -> AsyncSequence:
        """Begins a sequence whose timesteps are sent, and answered, as they come.

        All sequences of a client share one RPC, and survive the loss of it; see `AsyncSequence`. Use it as
        `async with client.unroll() as sequence`.

        Args:
            model: Model name; where absent, the snapshot's, or else the client's.
            version: Model version; 0 picks the snapshot's, or else the newest.
            snapshot: State to go on from; absent, the sequence begins at its zero state, step 0.
            states: Report the last layer's hidden state after each step.
            logits: Report each step's logits.
            every: Report every n-th step only: those whose count of consumed steps divides by n.
            timeout: Seconds to wait for one answer; the client's where absent.

        Raises:
            InvalidArgument: `every` is less than 1, or it or `version` is no number of 32 bits.
        """
        check_number("every", every, least=1)
        check_number("version", version)
        name = (snapshot.model if snapshot else self._model) if model is None else model
        opening = pb.OpenSequence(
            model=name,
            version=version,
            initial_state=snapshot.to_proto() if snapshot else None,
            return_states=states,
            return_logits=logits,
            every=every,
        )
        wait = self._calls.timeout if timeout is None else timeout
        return AsyncSequence(self, opening, None if math.isinf(wait) else wait, self._reconnect_timeout)

    @_explaining
    async def advance(
        self,
        session_id: str,
        chunk: ArrayLike | None = None,
        *,
        model: str | None = None,
        version: int = 0,
        start: bool = False,
        end: bool = False,
        first_step: int | None = None,
        snapshot: Snapshot | None = None,
        states: bool = True,
        logits: bool = False,
        return_snapshot: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 (as above)
    ) -> SessionSteps:
        """Advances a session, a sequence whose state the server keeps, under an id of the caller's own.

        With `first_step` a chunk is applied once, however often it is sent, so the call is tried again when a server
        goes away; so is one that starts a session. Others are not: whether they were applied, nobody could tell.

        A chunk over the server's limits goes as several requests, each applied once. If one fails, those before it are
        applied all the same: the error's `advanced` is their answer, from whose `step` the rest can be sent.

        Args:
            session_id: 1 to 128 bytes of UTF-8.
            chunk: The next timesteps [steps, features]; none only where the session starts or ends.
            model: Where it starts, as of `unroll`; later the session's own.
            version: Likewise.
            start: Begin the session, anew where there is one of this id.
            end: End it after these steps.
            first_step: Number of the first step: the `step` of the last answer. Absent: wherever the session is.
            snapshot: Where it starts, the state to start from.
            states: Answer the last layer's hidden state after each step.
            logits: Answer each step's logits.
            return_snapshot: Answer the state after these steps.
            timeout: Seconds in all; the client's where absent.

        Raises:
            NotFound: no such session (`reason` "SESSION_UNKNOWN"), it is no more ("SESSION_EXPIRED"), or no such model.
            Aborted: another writer has moved the session on.
            FailedPrecondition: the session has not come so far, or is on another model or version.
            ResourceExhausted: no room for another session ("SESSION_ROOM"), or for more work now.
            Unavailable: no server, or where it keeps the sessions does not answer ("SESSION_STORE").
            InvalidArgument, DeadlineExceeded, UnrollError: as they say.
        """
        if model is None:
            model = "" if not start else snapshot.model if snapshot else self._model
        request = advance_request(session_id, model, version, start, end, first_step, snapshot)
        request.return_states, request.return_logits, request.return_snapshot = states, logits, return_snapshot
        # Of any number of features: the server alone knows the session's model.
        values = None if chunk is None else pack_chunk(chunk)
        deadline = self._calls.deadline(timeout)
        parts = pieces(request, values, None if values is None else await self._limits(deadline))
        answers: list[SessionSteps] = []
        for number, part in enumerate(parts, 1):
            piece = piece_request(request, part, answers[-1] if answers else None, last=number == len(parts))
            try:
                if piece.start or piece.HasField("first_step"):
                    answer = await self._calls.make_repeatable(lambda server: server.Advance, piece, deadline)
                else:
                    answer = await self._calls.make(lambda server: server.Advance, piece, deadline, again=False)
            except UnrollError as error:
                if isinstance(error, InvalidArgument):
                    self._models.forget()  # Outdated limits can be the cause.
                error.advanced = joined_steps(answers) if answers else None
                raise
            answers.append(session_steps(answer, piece))
        return joined_steps(answers)

    @_explaining
    async def models(self, *, timeout: float | None = None) -> list[ModelInfo]:  # noqa: ASYNC109 (as above)
        """Lists the served model versions by name and version.

        Raises:
            UnrollError: the call failed.
        """
        request, deadline = pb.ListModelsRequest(), self._calls.deadline(timeout)
        answer = await self._calls.make(lambda server: server.ListModels, request, deadline)
        return [ModelInfo.from_proto(model) for model in answer.models]

    @_explaining
    async def model(
        self,
        name: str | None = None,
        version: int = 0,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 (as above)
    ) -> ModelInfo:
        """Returns a served model version.

        Args:
            name: Model name; the client's if absent.
            version: Model version; 0 picks the newest.
            timeout: Seconds; the client's if absent.

        Raises:
            NotFound: no such model or version.
            UnrollError: the call failed.
        """
        return await self._look_up(self._model if name is None else name, version, self._calls.deadline(timeout))

    async def close(self) -> None:
        """Cancels every call and closes the connections; waiting calls fail with Unavailable."""
        self._calls.closed = True
        if self._coalescer is not None:
            await self._coalescer.close()
        await self._models.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(stream.close() for stream in self._streams))
        self._streams.clear()
        await self._calls.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # For the sequences of this client.

    @property
    def closed(self) -> bool:
        """True if the client is closed."""
        return self._calls.closed

    @property
    def waits(self) -> bool:
        """True if calls wait for a server within their timeout instead of failing while there is none."""
        return self._calls.wait_for_ready

    def explained(self, error: UnrollError) -> UnrollError:
        """Adds the proxy of the environment, if there is one, to an error without an answer."""
        return error if self.closed else explained(error, self._targets)

    def shared_stream(self) -> SharedStream:
        """Returns the stream for new sequences; a new one if there is none or it is lost."""
        self._streams = [stream for stream in self._streams if not stream.ended]
        for stream in self._streams:
            if stream.usable:
                return stream
        servers = self._calls.servers()
        # Of several, the one that it would wait for may never come.
        wait = self._calls.wait_for_ready and len(servers) == 1
        call = traced_stream(servers.next().Unroll, self._calls.metadata, wait)
        self._streams.append(SharedStream(call))
        return self._streams[-1]

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Starts a task that is cancelled when the client closes."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def known_model(self, name: str, version: int) -> ModelInfo:
        """Returns a served model version, from memory if it is known."""
        return await self._models.find(name, version, self._calls.deadline(None))

    async def _limits(self, deadline: float) -> Limits | None:
        """Returns the limits of one RPC, which all models share; None if none is served."""
        if (known := self._models.any()) is None:
            request = pb.ListModelsRequest()
            answer = await self._calls.make_repeatable(lambda server: server.ListModels, request, deadline)
            for model in answer.models:
                known = ModelInfo.from_proto(model)
                self._models.remember(known.name, known.version, known)
        return None if known is None else known.limits

    async def _look_up(self, name: str, version: int, deadline: float) -> ModelInfo:
        check_number("version", version)
        request = pb.GetModelRequest(model=name, version=version)
        answer = await self._calls.make(lambda server: server.GetModel, request, deadline)
        info = ModelInfo.from_proto(answer.model)
        self._models.remember(name, version, info)
        return info

    async def _of_another_version(self, result: Classification, info: ModelInfo, deadline: float) -> Classification:
        """Completes a result that another version than the remembered one computed."""
        if result.version > info.version:
            self._models.forget()
        if result.final_states is None:
            return result
        with suppress(UnrollError):  # The number of layers only shapes the states.
            layers = (await self._models.find(result.model, result.version, deadline)).num_layers
            return replace(
                result, final_states=tuple(replace(state, num_layers=layers) for state in result.final_states)
            )
        return result

    async def _classify_in_time(self, deadline: float, request: pb.ClassifyRequest) -> pb.ClassifyResponse:
        return await self._calls.make(lambda server: server.Classify, request, deadline)

    async def _classify_once(self, request: pb.ClassifyRequest, deadline: float) -> pb.ClassifyResponse:
        return await self._calls.make_once(lambda server: server.Classify, request, deadline)
