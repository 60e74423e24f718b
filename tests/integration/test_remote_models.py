"""Models from a real S3 server: copied whole or not at all, polled, removed, and kept for when it is away."""

from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest
from support import bundles, wire
from support.processes import ServerProcess, run
from support.s3_server import S3Server, needs_s3
from support.waiting import until

from unroll_proto.v1 import unroll_pb2 as pb

pytestmark = needs_s3


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3Server]:
    with S3Server(tmp_path / "s3.log") as server:
        yield server


async def served_by(process: ServerProcess) -> list[str]:
    async with grpc.aio.insecure_channel(process.address) as channel:
        listed = await wire.stub_of(channel).ListModels(pb.ListModelsRequest())
        return [f"{model.name}/{model.version}" for model in listed.models]


async def test_models_of_a_bucket(s3: S3Server, bundle_root: Path, tmp_path: Path) -> None:
    first = bundle_root / "jv" / "1"
    second, third = (bundles.publish(first, tmp_path / "new", "jv", version) for version in (2, 3))
    url, poll = "s3://models/some/where", ("--models-poll", "0.05")
    options = ("--models-cache", str(tmp_path / "cache"), "--workers", "2")
    s3.upload(first, "some/where/jv/1")
    s3.put("some/where/README", b"no version")
    with ServerProcess(url, tmp_path / "log", *options, *poll, env=s3.env) as server:

        async def serves(*expected: str) -> None:
            async def holds() -> bool:
                return await served_by(server) == list(expected)

            await until(holds, lambda: server.log)

        await serves("jv/1")
        # Without a manifest, and with a file that is not the manifest's, a version is not there.
        for file in sorted(second.iterdir()):
            if file.name != "manifest.json":
                s3.put(f"some/where/jv/2/{file.name}", file.read_bytes()[: -1 if file.suffix == ".onnx" else None])
        s3.put("some/where/jv/2/manifest.json", (second / "manifest.json").read_bytes())
        await until(lambda: "jv/2 is not copied: " in server.log, lambda: server.log)
        s3.upload(third, "some/where/jv/3")
        await serves("jv/1", "jv/3")
        s3.put("some/where/jv/2/model.onnx", (second / "model.onnx").read_bytes())
        await serves("jv/1", "jv/2", "jv/3")
        s3.remove("some/where/jv/1/manifest.json")
        await serves("jv/2", "jv/3")
        s3.kill()
        await until(lambda: "can't be read, copied models are still served: " in server.log, lambda: server.log)
        # Also by the worker that had not seen yet that jv/1 is gone.
        await serves("jv/2", "jv/3")
        assert server.stop() == 0
    # The copies serve while the bucket is away.
    with ServerProcess(url, tmp_path / "log", *options, env=s3.env) as server:
        assert await served_by(server) == ["jv/2", "jv/3"]
        assert server.stop() == 0


def test_a_bucket_that_can_not_be_read_ends_the_start(s3: S3Server, tmp_path: Path) -> None:
    cache = ("--models-cache", tmp_path / "cache")
    for url, problem in {
        "s3://absent/models": "s3://absent/models can't be read",
        "nothing://models": "--models: nothing://models: Protocol not known",
    }.items():
        done = run("unroll-serve", "--models", url, *cache, check=False, env=s3.env)
        assert done.returncode == 2
        assert problem in done.stderr.splitlines()[-1]
