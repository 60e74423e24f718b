"""Fixtures that many tests share: a trained run, its bundle, a running server."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.processes import ServerProcess, run

from unroll_export.runs import TrainedRun, load_run
from unroll_export.sources import japanese_vowels_files
from unroll_proto.sequences import Sequence, read_sequences

# The tests run beside servers on few cores; more threads only get in their way.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `unroll-train` leaves after a few epochs on JapaneseVowels."""
    folder = tmp_path_factory.mktemp("runs") / "jv"
    run("unroll-train", "--data", "japanese-vowels", "--out", folder, "--epochs", "4")
    return folder


@pytest.fixture(scope="session")
def trained_run(run_folder: Path) -> TrainedRun:
    """The eager model of `run_folder`, in eval mode."""
    return load_run(run_folder)


@pytest.fixture(scope="session")
def bundle_root(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository that holds `jv`, version 1."""
    root = tmp_path_factory.mktemp("models")
    run("unroll-export", run_folder, "--out", root / "jv")
    return root


@pytest.fixture(scope="session", params=["grpcio", "envoy"])
def front(request: pytest.FixtureRequest) -> str:
    """What speaks gRPC: a test that starts a server does so on either."""
    name = str(request.param)
    if name == "envoy" and importlib.util.find_spec("pyvoy") is None:
        pytest.skip("Envoy is not installed here (unroll-server[envoy], Linux)")
    return name


@pytest.fixture(scope="session")
def server(bundle_root: Path, front: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of `bundle_root` that tests share and leave as it is."""
    with ServerProcess(bundle_root, tmp_path_factory.mktemp("server") / "log", front=front) as process:
        yield process
        assert process.stop() == 0, process.log


@pytest.fixture(scope="session")
def vowels() -> list[Sequence]:
    """The test split of JapaneseVowels."""
    return list(read_sequences(japanese_vowels_files()[1]))
