"""A worker: a process that serves under a supervisor (`python -m unroll_server.workers.worker RUNTIME_DIR NUMBER`)."""

import os

if __name__ == "__main__":
    from unroll_server.stopping import end_on_signals

    end_on_signals()
    REPORT = os.dup(1)
    # Output of libraries goes to the log.
    os.dup2(2, 1)

import asyncio
import logging
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from unroll_server.app import serve_until_stopped
from unroll_server.config import Settings
from unroll_server.errors import StartupError, UndrainedError
from unroll_server.identity.quotas import Quotas
from unroll_server.process import Stop, configure_logging, run, serving_event_loop
from unroll_server.stopping import end
from unroll_server.telemetry.metrics import Metrics
from unroll_server.workers.protocol import DRAINED, FAILED, REFUSED, UNDRAINED, Report
from unroll_server.workers.runtime_dir import RuntimeDir

_log = logging.getLogger(__name__)


async def serve(runtime_dir: RuntimeDir, worker: int, report: int) -> None:
    """Serves until a signal drains this process; ends the process with an exit code of the protocol.

    Args:
        runtime_dir: Runtime directory of the supervisor.
        worker: Number of this worker, from 0.
        report: Descriptor that takes the report.
    """
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), _end_without_supervisor, runtime_dir)
    settings = Settings.from_json(runtime_dir.settings.read_text())
    configure_logging(settings.log_level, settings.log_format)
    if settings.admin:
        settings = settings.replace(admin=f"unix:{runtime_dir.admin_socket(worker)}")
    try:
        await serve_until_stopped(
            settings,
            Metrics(runtime_dir.metrics, worker),
            # The supervisor's signal may find a worker that drains already, for longer than a second.
            Stop(impatient=False),
            lambda service, _: _send(report, Report(True, service.served)),
            partial(Quotas, folder=runtime_dir.quotas, worker=worker, workers=settings.workers),
        )
    except StartupError as error:
        _send(report, Report(False, str(error)))
        end(REFUSED)
    except UndrainedError as error:
        _log.error("%s", error)
        end(UNDRAINED)
    except Exception:
        _log.exception("the worker failed")
        end(FAILED)
    end(DRAINED)


def _send(descriptor: int, report: Report) -> None:
    # The supervisor may have ended.
    with suppress(BrokenPipeError), os.fdopen(descriptor, "wb") as file:
        file.write(report.encode())


def _end_without_supervisor(runtime_dir: RuntimeDir) -> None:
    """Ends this process at once, since nobody would restart or drain it."""
    # The supervisor had no time to log it.
    runtime_dir.remove()
    os._exit(FAILED)


if __name__ == "__main__":
    run(serve(RuntimeDir(Path(sys.argv[1])), int(sys.argv[2]), REPORT), serving_event_loop)
