"""An empty echo on the fronts' stacks: what a front costs where nothing is computed.

The method's name says how many bytes of the request the answer carries, so that messages have a real call's sizes:
`/bench.Echo/164`. `python -m bench.servers.echo grpcio|asgi-front|asgi-bare`; the last two run in Envoy.
"""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

import grpc
import grpc.aio

from bench.servers.serving import serve

APPS = {"asgi-front": "bench.servers.echo_front:app", "asgi-bare": "bench.servers.echo:bare"}
_FRAME = 5
"""Bytes before a gRPC message: whether it is compressed, and its length."""
Message = MutableMapping[str, Any]


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


async def bare(
    scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
) -> None:
    """The echo as an ASGI application that knows of gRPC only that a frame has five bytes before the message."""
    if scope["type"] == "lifespan":
        while True:
            event = await receive()
            await send({"type": f"{event['type']}.complete"})
            if event["type"] == "lifespan.shutdown":
                return
    body, more = b"", True
    while more:
        event = await receive()
        body += event.get("body", b"")
        more = event.get("more_body", False)
    size = int(scope["path"].rpartition("/")[2])
    answer = b"\0" + size.to_bytes(4) + body[_FRAME : _FRAME + size]
    start = {"type": "http.response.start", "status": 200, "trailers": True}
    await send({**start, "headers": [(b"content-type", b"application/grpc")]})
    await send({"type": "http.response.body", "body": answer, "more_body": False})
    await send({"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")], "more_trailers": False})


async def serve_in_envoy(app: str) -> None:
    """Runs one Envoy with one event loop around `app` until SIGTERM or SIGINT."""
    from pyvoy import PyvoyServer

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    options = ["--concurrency", "1"]
    async with PyvoyServer(app, lifespan=False, additional_envoy_args=options, stderr=sys.stderr.buffer) as server:
        print(f"serving {app} on 127.0.0.1:{server.listener_port}", flush=True)
        await stop.wait()


def main() -> None:
    """See the module."""
    kind = sys.argv[1]
    if kind == "grpcio":
        handler = EchoHandler()
        asyncio.run(serve("echo", lambda server: server.add_generic_rpc_handlers((handler,))))
    else:
        asyncio.run(serve_in_envoy(APPS[kind]))


if __name__ == "__main__":
    main()
