"""Client and SyncSequence: blocking versions of AsyncClient and AsyncSequence, which run on another thread."""

from __future__ import annotations

import weakref
from collections.abc import Generator
from collections.abc import Sequence as Listing
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self

from numpy.typing import ArrayLike

from unroll_client._async_client import DEFAULT_RECONNECT_TIMEOUT, DEFAULT_TARGET, DEFAULT_TIMEOUT, AsyncClient
from unroll_client._driver import Driver
from unroll_client._loop_thread import LoopThread
from unroll_client._sequence import AsyncSequence
from unroll_client._sessions import SessionSteps
from unroll_client._types import Classification, ModelInfo, Steps
from unroll_client._uncopied import Uncopied
from unroll_proto.snapshot import Snapshot


class SyncSequence(Uncopied):
    """One sequence that a server computes step by step; made by `Client.unroll`.

    A context manager: leaving it closes the sequence. The methods are those of `AsyncSequence`, blocking.
    """

    _instead = "send its snapshot(), and open another sequence from it"

    def __init__(self, thread: LoopThread, sequence: AsyncSequence) -> None:
        self._thread = thread
        self._sequence = sequence

    @property
    def step(self) -> int:
        """Number of the next timestep to send."""
        return self._sequence.step

    @property
    def model(self) -> str:
        """Name of the model."""
        return self._sequence.model

    @property
    def version(self) -> int:
        """Model version that the sequence stays on until it ends."""
        return self._sequence.version

    def send(self, chunk: ArrayLike) -> Steps:
        """Sends the next timesteps [steps, features] and waits for the whole answer; see `AsyncSequence.send`."""
        return self._thread.run(self._sequence.send(chunk))

    def stream(self, chunk: ArrayLike) -> Generator[Steps]:
        """Sends the next timesteps and yields their answers as they are computed; see `AsyncSequence.stream`."""
        answers = self._sequence.stream(chunk)
        try:
            while (steps := self._thread.run(_next(answers))) is not None:
                yield steps
        finally:
            # A closed client has ended the answers already.
            with suppress(RuntimeError):
                self._thread.finish(answers.aclose())

    def snapshot(self) -> Snapshot:
        """Returns the state after every chunk sent before; see `AsyncSequence.snapshot`."""
        return self._thread.run(self._sequence.snapshot())

    def close(self) -> Snapshot:
        """Ends the sequence and returns its last state; see `AsyncSequence.close`."""
        return self._thread.run(self._sequence.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A client may be closed before its sequences.
        with suppress(RuntimeError):
            self._thread.finish(self._sequence.__aexit__(kind, error, trace))


class Client(Uncopied):
    """Client of Unroll servers; thread-safe, and a context manager.

    The arguments and methods are those of `AsyncClient`, but the methods block. A background thread does the work. A
    client can be made before a fork and used on both sides, unless a call is in flight or a sequence is open during
    the fork.

    Args:
        target: "host:port" or any gRPC target; or several, in a list or separated by commas.
        model: Default model of calls; "" is the only model that is served.
        timeout: Seconds that a call may take; for a stream, the seconds to wait for one answer.
        reconnect_timeout: Seconds within which a sequence that lost its server must resume on another one; 0 to fail
            at once.
        wait_for_ready: Wait within the timeout while no server is reachable, instead of failing.
        coalesce: Let concurrent small `classify` calls share a request; their results do not change.
        tls: Encrypt, and trust the system's certificate authorities.
        root_certificates: PEM of the authorities to trust instead.
        certificate: PEM of the client's certificate chain and of its private key.
        server_name: Name to expect in the server's certificate.
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
        make = partial(
            AsyncClient,
            target,
            model=model,
            timeout=timeout,
            reconnect_timeout=reconnect_timeout,
            wait_for_ready=wait_for_ready,
            coalesce=coalesce,
            tls=tls,
            root_certificates=root_certificates,
            certificate=certificate,
            server_name=server_name,
            token=token,
            metadata=metadata,
        )
        self._driver = Driver(make)
        # Also closes a client that is garbage, or that is open when the process ends, while threads still run.
        self._finalizer = weakref.finalize(self, self._driver.close)

    def classify(
        self,
        sequences: Listing[ArrayLike],
        *,
        model: str | None = None,
        version: int = 0,
        initial_states: Listing[Snapshot | None] | None = None,
        return_final_states: bool = False,
        timeout: float | None = None,
    ) -> Classification:
        """Classifies sequences [steps, features] by their last timesteps; see `AsyncClient.classify`."""
        return self._driver.run(
            lambda client: client.classify(
                sequences,
                model=model,
                version=version,
                initial_states=initial_states,
                return_final_states=return_final_states,
                timeout=timeout,
            )
        )

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
    ) -> SyncSequence:
        """Opens a sequence whose timesteps are sent, and answered, as they arrive; see `AsyncClient.unroll`."""
        thread, sequence = self._driver.open(
            lambda client: client.unroll(
                model,
                version=version,
                snapshot=snapshot,
                states=states,
                logits=logits,
                every=every,
                timeout=timeout,
            )
        )
        return SyncSequence(thread, sequence)

    def advance(
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
        timeout: float | None = None,
    ) -> SessionSteps:
        """Advances a session, a sequence whose state the server keeps; see `AsyncClient.advance`."""
        return self._driver.run(
            lambda client: client.advance(
                session_id,
                chunk,
                model=model,
                version=version,
                start=start,
                end=end,
                first_step=first_step,
                snapshot=snapshot,
                states=states,
                logits=logits,
                return_snapshot=return_snapshot,
                bound=bound,
                timeout=timeout,
            )
        )

    def models(self, *, timeout: float | None = None) -> list[ModelInfo]:
        """Lists the served model versions; see `AsyncClient.models`."""
        return self._driver.run(lambda client: client.models(timeout=timeout))

    def model(self, name: str | None = None, version: int = 0, *, timeout: float | None = None) -> ModelInfo:
        """Returns a served model version; see `AsyncClient.model`."""
        return self._driver.run(lambda client: client.model(name, version, timeout=timeout))

    def close(self) -> None:
        """Closes the connections and ends the thread. Pending calls fail; later ones raise RuntimeError."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def _next(answers: Any) -> Steps | None:
    return await anext(answers, None)
