"""How the small grpc.aio servers here start, say where they are, and end."""

import asyncio
import signal
from collections.abc import Callable

import grpc.aio

MAX_MESSAGE_BYTES = 16 * 2**20


async def serve(name: str, register: Callable[[grpc.aio.Server], object]) -> None:
    """Serves on a free port of the loopback interface until SIGTERM or SIGINT, and announces it on stdout."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)])
    register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"serving {name} on 127.0.0.1:{port}", flush=True)
    await stop.wait()
    await server.stop(0)
