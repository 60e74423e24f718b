"""A worker: a process that serves under a supervisor (`python -m unroll_server.workers.worker`)."""

if __name__ == "__main__":
    from unroll_server.stopping import end_on_signals

    end_on_signals()

import asyncio
import logging
import os
import shutil
from functools import partial

from unroll_server.app import Service, serve_grpcio
from unroll_server.errors import StartupError, UndrainedError
from unroll_server.identity.quotas import Quotas
from unroll_server.identity.tokens import Identities
from unroll_server.process import Stop, configure_logging, run
from unroll_server.stopping import end
from unroll_server.telemetry.metrics import Metrics
from unroll_server.transport.grpcio import GrpcioTransport
from unroll_server.workers.channel import Channel, WorkerConfig
from unroll_server.workers.rpc import Answers

_log = logging.getLogger(__name__)


async def _receive_config() -> tuple[Channel, WorkerConfig]:
    channel = await Channel.inherited()
    message = await channel.receive()
    if message is None:
        os._exit(1)
    config = WorkerConfig.from_message(message)
    configure_logging(config.settings.log_level, config.settings.log_format)
    return channel, config


async def _watch(channel: Channel, config: WorkerConfig, stop: Stop, answers: Answers) -> None:
    """Answers the supervisor, and stops when told to; ends the process at once if the supervisor ends."""
    while message := await channel.receive():
        if "ask" in message:
            answers.take(message)
        else:
            stop.set()
    shutil.rmtree(config.folder, ignore_errors=True)
    os._exit(1)


async def serve() -> None:
    """Serves until the supervisor, SIGTERM or SIGINT stops it: at once before it serves, then by a drain.

    Ends the process with 1 if it has cancelled calls, with 2 if it can't serve.
    """
    channel, config = await _receive_config()
    stop = Stop()
    answers = Answers(channel)
    watching = asyncio.create_task(_watch(channel, config, stop, answers))
    figures = Metrics(config.metrics, config.worker)

    def started(service: Service[GrpcioTransport], address: str) -> None:
        answers.ask = service.commands.ask
        channel.send(serving=service.served)

    try:
        await serve_grpcio(config.settings, figures, stop, started, True, partial(_quotas, config))
    except StartupError as error:
        channel.send(failed=str(error))
        await channel.flush()
        end(2)
    except UndrainedError as error:
        _log.error("%s", error)
        end(1)
    watching.cancel()


def _quotas(config: WorkerConfig, identities: Identities) -> Quotas:
    return Quotas(identities, config.folder / "quotas", config.worker, config.settings.workers)


if __name__ == "__main__":
    run(serve())
    end(0)
