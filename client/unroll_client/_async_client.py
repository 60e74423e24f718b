"""AsyncClient: the implementation behind both clients."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Coroutine
from collections.abc import Sequence as Listing
from contextlib import suppress
from dataclasses import replace
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import grpc
from google.protobuf.message import Message
from numpy.typing import ArrayLike

from unroll_client._arrays import check_number, pack_chunk
from unroll_client._calls import Calls, Rpc
from unroll_client._channel import Connection, targets_of
from unroll_client._classify import Batch, classify
from unroll_client._client_api import ClientApi
from unroll_client._coalesce import Coalescer
from unroll_client._errors import InvalidArgument, NotFound, UnrollError
from unroll_client._models import Models
from unroll_client._sequence import AsyncSequence
from unroll_client._servers import Server
from unroll_client._sessions import (
    SessionSteps,
    advance_request,
    joined_steps,
    of_session,
    piece_request,
    pieces,
    session_steps,
)
from unroll_client._types import Classification, Limits, ModelInfo
from unroll_client._uncopied import Uncopied
from unroll_proto.snapshot import Snapshot
from unroll_proto.v1 import unroll_pb2 as pb

P = ParamSpec("P")
T = TypeVar("T")
MessageT = TypeVar("MessageT", bound=Message)

DEFAULT_TARGET = "localhost:50051"
DEFAULT_TIMEOUT = 30.0
DEFAULT_RECONNECT_TIMEOUT = 30.0


def _explaining(
    method: Callable[Concatenate[AsyncClient, P], Awaitable[T]],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    """Wraps a method so that its errors name the proxy that calls go through, if there is one."""

    @wraps(method)
    async def explaining(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(self, *args, **kwargs)
        except UnrollError as error:
            raise self._api.explained(error) from error.__cause__

    return explaining


class AsyncClient(Uncopied):
    """Client of Unroll servers for one asyncio event loop; an async context manager.

    The first call connects. Calls that change nothing on the server (all but streams) are retried, with growing
    pauses, if a server is unreachable or asks for a retry.

    Args:
        target: "host:port" or any gRPC target; or several, in a list or separated by commas. Calls go in turn to the
            servers that are reachable. A name with several addresses is balanced over all of them.
        model: Default model of calls; "" is the only model that is served.
        timeout: Seconds that a call may take, retries included; for a stream, the seconds to wait for one answer.
            `math.inf` for no limit.
        reconnect_timeout: Seconds within which a sequence that lost its server must resume on another one. After that
            it fails with its last snapshot. With 0 it fails at once, and nothing is kept to be sent again.
        wait_for_ready: Wait within the timeout while no server is reachable, instead of failing.
        coalesce: Let concurrent small `classify` calls share a request. Each gets the result or the error, and the
            bits, of a request of its own.
        tls: Encrypt, and trust the system's certificate authorities; implied by the next two arguments.
        root_certificates: PEM of the authorities to trust instead.
        certificate: PEM of the client's certificate chain and of its private key, for mutual TLS.
        server_name: Name to expect in the server's certificate, if it is not the target's host.
        token: Bearer token to send with every call.
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
        self._connection = connection
        self._calls = Calls(connection, timeout, wait_for_ready)
        self._model = model
        self._reconnect_timeout = reconnect_timeout
        self._models = Models(self._look_up)
        self._api = ClientApi(self._calls, self._models, connection.targets)
        self._coalescer = Coalescer(self._classify_once, self._models.forget) if coalesce else None

    def with_metadata(
        self,
        metadata: Listing[tuple[str, str]],
        *,
        retry_refused: bool = True,
        reconnect_timeout: float | None = None,
    ) -> AsyncClient:
        """Returns a client that sends more metadata, such as another caller's token, on the same connections.

        It shares no requests and no stream with other clients. Closing it ends its own calls; close it before this one.

        Args:
            metadata: Pairs, which replace those of the same keys; ("authorization", "Bearer ...") replaces the token.
            retry_refused: False to raise ResourceExhausted at once, instead of waiting as the server asks.
            reconnect_timeout: As of the class; None for this client's.

        Raises:
            ValueError: the metadata can't be sent.
        """
        made = object.__new__(AsyncClient)
        made._connection = self._connection.with_metadata(metadata)
        made._calls = Calls(made._connection, self._calls.timeout, self._calls.wait_for_ready, self._calls)
        made._calls.retry_refused = retry_refused
        made._model = self._model
        made._reconnect_timeout = self._reconnect_timeout if reconnect_timeout is None else reconnect_timeout
        made._models = Models(made._look_up, self._models)
        made._api = ClientApi(made._calls, made._models, made._connection.targets)
        made._coalescer = None
        return made

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
        """Classifies sequences by the logits of their last timesteps.

        Input over the server's limits is split over several RPCs. A sequence that is too long is computed in pieces,
        with the same bits as in one.

        Args:
            sequences: Arrays [steps, features] of numbers, of any lengths, from NumPy or any library that NumPy can
                read. They are sent as float32: floats are rounded, integers must be exact. An empty list gives an
                empty result.
            model: Name of the model; None for the client's default.
            version: Version of the model; 0 for the newest.
            initial_states: For each sequence the snapshot to resume from, or None for the zero state.
            return_final_states: True to return the state after each sequence's last timestep.
            timeout: Seconds that the call may take; None for the client's default.

        Returns:
            A label, a row of probabilities and a row of logits for each sequence, in order.

        Raises:
            InvalidArgument: a sequence can't be used or is over a limit; `fields` names it.
            NotFound: there is no such model or version.
            FailedPrecondition: a snapshot is of another model or version.
            DeadlineExceeded: the timeout passed.
            ResourceExhausted: the server had no room until then.
            Unavailable: no server was reachable.
            UnrollError: the call failed otherwise.
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
            # Outdated model metadata can be the cause.
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
        """Begins a sequence whose timesteps are sent, and answered, as they arrive.

        All sequences of a client share one RPC and survive its loss; see `AsyncSequence`. Use it as `async with
        client.unroll() as sequence`.

        Args:
            model: Name of the model; None for the snapshot's, or else the client's default.
            version: Version of the model; 0 for the snapshot's, or else the newest.
            snapshot: State to resume from; None for the zero state, at step 0.
            states: True to return the last layer's hidden state after each step.
            logits: True to return the logits of each step.
            every: Return only every n-th step: those after which the count of consumed steps is a multiple of n.
            timeout: Seconds to wait for one answer; None for the client's default.

        Raises:
            InvalidArgument: `every` is less than 1, or `every` or `version` does not fit 32 bits.
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
        return AsyncSequence(self._api, opening, None if math.isinf(wait) else wait, self._reconnect_timeout)

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
        bound: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 (as above)
    ) -> SessionSteps:
        """Advances a session: a sequence whose state the server keeps, under an id that the caller chooses.

        With `first_step` the server applies a chunk once, however often it is sent. So this call is retried when a
        server is lost, as is one that starts a session. Other calls are not, since they may have been applied.

        A chunk over the server's limits is split over several requests, each applied once. If one fails, those before
        it stay applied: the error's `advanced` is their answer, and the rest can be sent from its `step`.

        Args:
            session_id: 1 to 128 bytes of UTF-8.
            chunk: The next timesteps [steps, features]; None only to start or end a session.
            model: Name of the model of a session that starts, as in `unroll`; else it must be the session's.
            version: Version of the model, likewise.
            start: True to start the session, over again if there is one of this id.
            end: True to end the session after these steps.
            first_step: Number of the chunk's first step, the `step` of the previous answer; None to append to
                wherever the session is.
            snapshot: State that a new session starts from.
            states: True to return the last layer's hidden state after each step.
            logits: True to return the logits of each step.
            return_snapshot: True to return the state after these steps.
            bound: True to end a session that starts when this client's connection closes: by `close`, with the
                process, or for any other reason (docs/sessions.md).
            timeout: Seconds that the call may take; None for the client's default.

        Raises:
            NotFound: there is no such model, or no such session: `reason` is "SESSION_UNKNOWN" or "SESSION_EXPIRED".
            Aborted: another writer advanced the session.
            FailedPrecondition: `first_step` leaves a gap, or the session is on another model or version.
            ResourceExhausted: there is no room for another session ("SESSION_ROOM") or for more work.
            Unavailable: no server was reachable, or the server could not reach its session store ("SESSION_STORE").
            InvalidArgument: an argument can't be used; `fields` names it.
            DeadlineExceeded: the timeout passed.
            UnrollError: the call failed otherwise; its `code` is UNIMPLEMENTED if the server can't bind a session.
        """
        if model is None:
            model = "" if not start else snapshot.model if snapshot else self._model
        request = advance_request(session_id, model, version, start, end, first_step, snapshot, bound)
        request.return_states, request.return_logits, request.return_snapshot = states, logits, return_snapshot
        # With any number of features: only the server knows the session's model.
        values = None if chunk is None else pack_chunk(chunk)
        deadline = self._calls.deadline(timeout)
        parts = pieces(request, values, None if values is None else await self._limits(deadline))
        answers: list[SessionSteps] = []

        def rpc(server: Server) -> Rpc[pb.AdvanceResponse]:
            return of_session(server.Advance, session_id)

        for number, part in enumerate(parts, 1):
            piece = piece_request(request, part, answers[-1] if answers else None, last=number == len(parts))
            try:
                if piece.start or piece.HasField("first_step"):
                    answer = await self._calls.make_repeatable(rpc, piece, deadline)
                else:
                    answer = await self._calls.make(rpc, piece, deadline, again=False)
            except UnrollError as error:
                if isinstance(error, InvalidArgument):
                    self._models.forget()  # Outdated limits can be the cause.
                error.advanced = joined_steps(answers) if answers else None
                raise
            answers.append(session_steps(answer, piece))
        steps = joined_steps(answers)
        if steps.logits is None:
            return steps
        # The state is applied: what describes the outputs must not make the call fail.
        with suppress(UnrollError):
            model_info = await self._models.find(steps.model, steps.version, deadline)
            steps = replace(steps, _outputs=model_info.outputs)
        return steps

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

    @_explaining
    async def call(
        self,
        path: str,
        request: Message,
        response: type[MessageT],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 (as above)
    ) -> MessageT:
        """Calls any method with one request and one response, such as one of the Open Inference Protocol.

        It is not repeated when a server is lost, since it may have been carried out.

        Args:
            path: `/package.Service/Method`.
            request: Its request.
            response: Type of its response.
            timeout: Seconds that the call may take; None for the client's default.

        Raises:
            UnrollError: the call failed.
        """

        def method(server: Server) -> grpc.aio.UnaryUnaryMultiCallable[Message, MessageT]:
            return server.channel.unary_unary(path, type(request).SerializeToString, response.FromString)

        return await self._calls.make(method, request, self._calls.deadline(timeout), again=False)

    async def close(self) -> None:
        """Closes the connections; pending calls fail with Unavailable."""
        self._calls.closed = True
        if self._coalescer is not None:
            await self._coalescer.close()
        await self._models.close()
        await self._api.close()
        await self._calls.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

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
        """Completes a result that was computed by another version than the remembered one."""
        if result.version > info.version:
            self._models.forget()
        if result.final_states is None:
            return result
        with suppress(UnrollError):  # The number of layers only gives the states their shape.
            layers = (await self._models.find(result.model, result.version, deadline)).num_layers
            return replace(
                result, final_states=tuple(replace(state, num_layers=layers) for state in result.final_states)
            )
        return result

    async def _classify_in_time(self, deadline: float, request: pb.ClassifyRequest) -> pb.ClassifyResponse:
        return await self._calls.make(lambda server: server.Classify, request, deadline)

    async def _classify_once(self, request: pb.ClassifyRequest, deadline: float) -> pb.ClassifyResponse:
        return await self._calls.make_once(lambda server: server.Classify, request, deadline)
