"""A worker: a process that serves under a supervisor, by grpcio (`python -m unroll_server.worker`) or inside Envoy."""

import asyncio
import logging
import os
import shutil
import signal
from functools import partial
from typing import Any

from unroll_server.app import LINGER, Service, serve_grpcio
from unroll_server.control import Channel, Orders, admin_socket, gate_file
from unroll_server.errors import StartupError
from unroll_server.fronts import envoy
from unroll_server.fronts.asgi import AsgiFront
from unroll_server.fronts.gate import Gate
from unroll_server.fronts.grpcio import GrpcioFront
from unroll_server.identities import Identities
from unroll_server.metrics import Metrics
from unroll_server.process import configure_logging
from unroll_server.relay import Answers
from unroll_server.usage import Usage

_log = logging.getLogger(__name__)


async def _begin() -> tuple[Channel, Orders]:
    channel = await Channel.inherited()
    message = await channel.receive()
    if message is None:
        os._exit(1)
    orders = Orders.from_message(message)
    configure_logging(orders.settings.log_level, orders.settings.log_format)
    return channel, orders


async def _watch(channel: Channel, orders: Orders, stop: asyncio.Event, answers: Answers) -> None:
    """Answers the supervisor, and sets `stop` when it says so; without a supervisor the process ends at once."""
    while message := await channel.receive():
        if "ask" in message:
            answers.take(message)
        else:
            stop.set()
    shutil.rmtree(orders.folder, ignore_errors=True)
    os._exit(1)


async def _fail(channel: Channel, error: StartupError) -> None:
    """Tells why it can't serve and ends the process, which then has no more to say."""
    channel.send(failed=str(error))
    await channel.flush()
    os._exit(2)


async def serve() -> None:
    """Serves by grpcio until the supervisor ends it."""
    channel, orders = await _begin()
    stop = asyncio.Event()
    answers = Answers(channel)
    watching = asyncio.create_task(_watch(channel, orders, stop, answers))
    figures = Metrics(orders.metrics, orders.worker)

    def started(service: Service[GrpcioFront], address: str) -> None:
        answers.ask = service.commands.ask
        channel.send(serving=service.served)

    try:
        await serve_grpcio(orders.settings, figures, stop, started, True, partial(_usage, orders))
    except StartupError as error:
        await _fail(channel, error)
    watching.cancel()


def _usage(orders: Orders, identities: Identities) -> Usage:
    return Usage(identities, orders.folder / "usage", orders.worker, orders.settings.workers)


class Application:
    """The ASGI application that Envoy runs; its lifespan is the server's."""

    def __init__(self) -> None:
        self._front: AsgiFront
        self._life: asyncio.Task[None]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI 3."""
        if scope["type"] == "http":
            await self._front(scope, receive, send)
        elif scope["type"] == "lifespan":
            await receive()
            await self._start()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})

    async def _start(self) -> None:
        channel, orders = await _begin()
        settings = orders.settings
        figures = Metrics(orders.metrics, orders.worker)
        gate = Gate(gate_file(orders.folder, orders.worker), figures)
        try:
            service = Service(
                settings,
                figures,
                lambda interceptors: AsgiFront(interceptors, settings.max_message_bytes, gate),
                partial(_usage, orders),
            )
            await service.open()
        except StartupError as error:
            await _fail(channel, error)
        self._front = service.front
        self._life = asyncio.create_task(self._live(channel, orders, service))

    async def _live(self, channel: Channel, orders: Orders, service: Service[AsgiFront]) -> None:
        stop = asyncio.Event()
        answers = Answers(channel)
        answers.ask = service.commands.ask
        watching = asyncio.create_task(_watch(channel, orders, stop, answers))
        admin = admin_socket(orders.folder, orders.worker)
        try:
            await envoy.wait_until_listening(admin)
            channel.send(serving=service.served)
            await stop.wait()
            loop = asyncio.get_running_loop()
            until = loop.time() + orders.settings.drain_timeout
            await service.drain()
            # What the handlers have given is still on its way through Envoy.
            async with asyncio.timeout_at(max(until, loop.time() + LINGER)):
                await envoy.wait_until_sent(admin)
        except TimeoutError:
            _log.warning("a caller did not take its last answer")
        except Exception:
            _log.exception("the worker failed")
            os._exit(1)
        finally:
            watching.cancel()
            service.close()
        # Envoy's own way to end.
        os.kill(os.getpid(), signal.SIGTERM)


app = Application()

if __name__ == "__main__":
    asyncio.run(serve())
