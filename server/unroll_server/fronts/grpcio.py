"""The front of grpcio: grpc.aio's own server."""

from collections.abc import Sequence

import grpc.aio

from unroll_server.errors import StartupError
from unroll_server.fronts.registry import Registry


class GrpcioFront:
    """A grpc.aio server.

    Args:
        listen: HOST:PORT; port 0 picks a free one.
        interceptors: What stands before every handler, outermost first; see `Registry`.
        max_message_bytes: The largest request message; a larger one is RESOURCE_EXHAUSTED.
        share_port: Whether other processes listen on the same port, each to get a share of the connections.

    Attributes:
        registry: What the generated `add_...Servicer_to_server` functions take.
    """

    def __init__(
        self,
        listen: str,
        interceptors: Sequence[grpc.aio.ServerInterceptor],
        max_message_bytes: int,
        share_port: bool = False,
    ) -> None:
        self._listen = listen
        self.registry = Registry(interceptors)
        # An interceptor that grpcio itself asks costs each call two coroutines.
        self._server = grpc.aio.server(
            handlers=[self.registry],
            interceptors=self.registry.each_call,
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),
                # Two servers that share a port by accident would each get half of the calls.
                ("grpc.so_reuseport", int(share_port)),
                # A burst of calls waits for its turn; from 1,000 on some would be CANCELLED otherwise.
                ("grpc.server.max_pending_requests", 2**31 - 1),
                ("grpc.server.max_pending_requests_hard_limit", 2**31 - 1),
            ],
        )

    async def start(self) -> str:
        """Listens and serves; returns HOST:PORT with the port that it got.

        Raises:
            StartupError: the address can't be listened on.
        """
        try:
            port = self._server.add_insecure_port(self._listen)
        except RuntimeError:
            raise StartupError(f"--listen: can't listen on {self._listen}; is the port in use?") from None
        await self._server.start()
        return f"{self._listen.rpartition(':')[0]}:{port}"

    async def stop(self, grace: float) -> None:
        """Takes no new calls, waits for those in flight, and cancels what is not done after `grace` seconds."""
        await self._server.stop(grace)
