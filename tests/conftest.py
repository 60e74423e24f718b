"""Fixtures that many tests share: a trained run, its bundle, a running server."""

import fcntl
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from support.processes import TRAINING_BIN, ServerProcess, run

from unroll_proto.sequences import Sequence, read_sequences
from unroll_server.transport import native

if TYPE_CHECKING:
    from unroll_export.runs import TrainedRun


class _SkipWithoutTorch(MetaPathFinder):
    """Skips the tests that import torch, or what only unroll_export needs, where these are not installed."""

    def find_spec(self, name: str, *_: object) -> None:
        """Checks every import that no other finder resolved."""
        if name in ("torch", "unroll_export", "matplotlib", "onnx", "safetensors", "tensorboard"):
            pytest.skip(f"{name} is not installed", allow_module_level=True)


# No timed assertions: an example may take any time on a shared machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

if importlib.util.find_spec("torch"):
    import torch

    # The tests run beside servers on few cores; more threads would slow both.
    torch.set_num_threads(1)
else:
    sys.meta_path.append(_SkipWithoutTorch())


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Returns a folder that the first process of this pytest run makes, and that all share without changes."""
    base = factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)
    folder = root / name
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            make(draft := factory.mktemp(name) / name)
            draft.rename(folder)
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of `unroll-train` after a few epochs on JapaneseVowels."""

    def train(folder: Path) -> None:
        run(TRAINING_BIN / "unroll-train", "--data", "japanese-vowels", "--out", folder, "--epochs", "4")

    return made_once(tmp_path_factory, "jv", train)


@pytest.fixture(scope="session")
def trained_run(run_folder: Path) -> "TrainedRun":
    """The eager model of `run_folder`, in eval mode."""
    from unroll_export.runs import load_run

    return load_run(run_folder)


@pytest.fixture(scope="session")
def bundle_root(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository that holds `jv`, version 1."""
    return made_once(
        tmp_path_factory, "models", lambda root: run(TRAINING_BIN / "unroll-export", run_folder, "--out", root / "jv")
    )


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Bundles of two small networks of the same sizes and different weights."""
    from support import bundles
    from support.models import random_network

    root = tmp_path_factory.mktemp("exported")
    return [bundles.export(random_network(seed=seed), root) for seed in range(2)]


@pytest.fixture(scope="session")
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    """Transport of the servers started from now on; the default unless support.transports is used."""
    name = getattr(request, "param", "auto")
    if name == "native" and (reason := native.unavailable_reason()):
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        if name != "auto":
            patch.setenv("UNROLL_TRANSPORT", name)
        yield name


@pytest.fixture(scope="session")
def server(bundle_root: Path, tmp_path_factory: pytest.TempPathFactory, transport: str) -> Iterator[ServerProcess]:
    """A server of `bundle_root` that tests share without changes."""
    with ServerProcess(bundle_root, tmp_path_factory.mktemp("server") / "log") as process:
        yield process
        assert process.stop() == 0, process.log


@pytest.fixture(scope="session")
def vowels() -> list[Sequence]:
    """The test split of JapaneseVowels."""
    aeon = importlib.util.find_spec("aeon")
    assert aeon is not None
    assert aeon.submodule_search_locations is not None
    folder = Path(aeon.submodule_search_locations[0], "datasets", "data", "JapaneseVowels")
    return list(read_sequences(folder / "JapaneseVowels_TEST.ts"))
