"""A worker: a process that serves under a supervisor (`python -m unroll_server.worker`)."""

if __name__ == "__main__":
    from unroll_server.stopping import end_on_signals

    end_on_signals()

import asyncio
import logging
import os
import shutil
from functools import partial

from unroll_server.app import Service, serve_grpcio
from unroll_server.control import Channel, Orders
from unroll_server.errors import StartupError, UndrainedError
from unroll_server.identities import Identities
from unroll_server.metrics import Metrics
from unroll_server.process import Stop, configure_logging
from unroll_server.relay import Answers
from unroll_server.transport.grpcio import GrpcioTransport
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
    """Serves until the supervisor, SIGTERM or SIGINT ends it: at once before it serves, then by a drain."""
    channel, orders = await _begin()
    stop = Stop()
    answers = Answers(channel)
    watching = asyncio.create_task(_watch(channel, orders, stop, answers))
    figures = Metrics(orders.metrics, orders.worker)

    def started(service: Service[GrpcioTransport], address: str) -> None:
        answers.ask = service.commands.ask
        channel.send(serving=service.served)

    try:
        await serve_grpcio(orders.settings, figures, stop, started, True, partial(_usage, orders))
    except StartupError as error:
        await _fail(channel, error)
    except UndrainedError as error:
        _log.error("%s", error)
        os._exit(1)
    watching.cancel()


def _usage(orders: Orders, identities: Identities) -> Usage:
    return Usage(identities, orders.folder / "usage", orders.worker, orders.settings.workers)


if __name__ == "__main__":
    asyncio.run(serve())
