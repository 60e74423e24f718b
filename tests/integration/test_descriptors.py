"""Descriptors of every process of a server: the limit is the system's, and unloaded models leave none."""

import resource
import sys
from pathlib import Path

import numpy as np
import pytest
from support import bundles, wire
from support.operators import channel_to
from support.processes import ServerProcess
from support.workers import workers_of

from unroll_proto.v1 import unroll_pb2 as pb

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
RELOADS = 25


def descriptors(process: ServerProcess) -> list[int]:
    """Returns the descriptors of each process, the parent first."""
    return [each.descriptors for each in process.family()]


async def test_reloads_leave_no_descriptors_and_the_limit_is_the_system_s(bundle_root: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    bundle = bundle_root / "jv" / "1"
    bundles.publish(bundle, models, "m", 1)
    options = ("--models-poll", "0.02", "--workers", "2", "--metrics", "127.0.0.1:0")
    request = pb.ListModelsRequest()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        process = ServerProcess(models, tmp_path / "log", *options)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    async def until_served(version: int, connections: int) -> None:
        for _ in range(connections):
            # Each connection may reach another worker.
            async with channel_to(process.address) as channel:
                stub = wire.stub_of(channel)
                while version not in [model.version for model in (await stub.ListModels(request)).models]:
                    pass
                await stub.Classify(wire.classify_request([np.zeros((1, 12), np.float32)], "m", version=version))

    with process:
        for pid in (process.process.pid, *workers_of(process.process.pid)):
            assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] == hard
        await until_served(1, 6)
        before = descriptors(process)
        for version in range(2, RELOADS + 2):
            bundles.publish(bundle, models, "m", version)
            await until_served(version, 1)
            bundles.withdraw(models / "m" / str(version - 1))
        await until_served(RELOADS + 1, 6)
        # Connections that open or close may change the count by a few.
        assert sum(descriptors(process)) <= sum(before) + RELOADS // 2
        assert process.stop() == 0, process.log
