"""A repository at the start of a server: good versions are served, bad ones refused with the reason."""

import shutil
from pathlib import Path

import grpc.aio
import pytest
from support import bundles, wire
from support.processes import ServerProcess, run

from unroll_proto.v1 import unroll_pb2 as pb


@pytest.fixture
def repository(bundle_root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_root, tmp_path / "models"))


@pytest.fixture(scope="module")
def exported(bundle_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of two versions of `jv` and one of `other`."""
    root = Path(shutil.copytree(bundle_root, tmp_path_factory.mktemp("several") / "models"))
    for name, version in (("jv", 2), ("other", 1)):
        bundles.publish(bundle_root / "jv" / "1", root, name, version)
    return root


@pytest.fixture
def several(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "models"))


def corrupt(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


async def served_by(process: ServerProcess) -> list[tuple[str, int]]:
    async with grpc.aio.insecure_channel(process.address) as channel:
        listed = await wire.stub_of(channel).ListModels(pb.ListModelsRequest())
        return [(model.name, model.version) for model in listed.models]


def test_a_server_without_a_good_version_does_not_start(repository: Path) -> None:
    corrupt(repository / "jv" / "1" / "model.ts")
    done = run("unroll-serve", "--models", repository, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("unroll-serve: --models: no bundle under")
    assert "model.ts: sha256" in last


@pytest.mark.parametrize("corrupted", ["manifest.json", "parity.json", "model.onnx", "weights.safetensors"])
async def test_a_bad_version_is_refused_and_the_good_one_serves(several: Path, tmp_path: Path, corrupted: str) -> None:
    corrupt(several / "jv" / "2" / corrupted)
    with ServerProcess(several, tmp_path / "log") as process:
        assert await served_by(process) == [("jv", 1), ("other", 1)]
        assert process.stop() == 0
        assert "refused" in process.log
        assert corrupted in process.log


async def test_versions_are_served_side_by_side_and_the_newest_by_default(several: Path, tmp_path: Path) -> None:
    with ServerProcess(several, tmp_path / "log") as process:
        assert await served_by(process) == [("jv", 1), ("jv", 2), ("other", 1)]
        async with grpc.aio.insecure_channel(process.address) as channel:
            stub = wire.stub_of(channel)
            assert (await stub.GetModel(pb.GetModelRequest(model="jv"))).model.version == 2
            assert (await stub.GetModel(pb.GetModelRequest(model="jv", version=1))).model.version == 1
            # A snapshot resumes on its own version.
            opened = await wire.exchange(
                stub, [wire.open_request("a", version=1), wire.snapshot_request("a"), wire.close_request("a")]
            )
            snapshot = opened[1].snapshot
            again = await wire.exchange(stub, [wire.open_request("b", initial_state=snapshot)])
            assert again[0].opened.version == 1
            with pytest.raises(grpc.aio.AioRpcError, match="required when several are served"):
                await stub.GetModel(pb.GetModelRequest())
        assert process.stop() == 0


def test_a_renamed_bundle_is_refused(repository: Path) -> None:
    (repository / "jv" / "1").rename(repository / "jv" / "7")
    done = run("unroll-serve", "--models", repository, check=False)
    assert done.returncode == 2
    assert "the manifest says jv/1" in done.stderr
