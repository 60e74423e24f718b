"""An empty echo by grpc.aio: the cost of a call that computes nothing.

The method's name gives the bytes of the request that the answer carries, so that messages have a real call's sizes:
`/bench.Echo/164`.
"""

import asyncio
from functools import partial

import grpc
import grpc.aio

from bench.servers.serving import serve


async def echo(size: int, request: bytes, context: object) -> bytes:
    """The first `size` bytes of the request."""
    return request[:size]


class EchoHandler(grpc.GenericRpcHandler):
    """Every method of bench.Echo."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
        """See grpc.GenericRpcHandler."""
        service, _, size = handler_call_details.method.lstrip("/").partition("/")
        if service != "bench.Echo":
            return None
        return grpc.unary_unary_rpc_method_handler(partial(echo, int(size)))


def main() -> None:
    """See the module."""
    handler = EchoHandler()
    asyncio.run(serve("echo", lambda server: server.add_generic_rpc_handlers((handler,))))


if __name__ == "__main__":
    main()
