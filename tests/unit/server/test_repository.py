"""The repository: what is served follows the folder, and nothing goes that somebody still needs."""

import asyncio
import gc
import logging
import os
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from support import bundles
from support.models import alone, random_network

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.errors import ModelNotFoundError
from unroll_engine.jobs import BatchJob
from unroll_engine.models.loader import Loader, Model
from unroll_engine.models.spec import ModelKey
from unroll_server.errors import ModelRefusedError, SessionStoreError, StartupError
from unroll_server.repository.catalog import Catalog
from unroll_server.repository.repository import CountSessions, Repository
from unroll_server.repository.version import VersionState
from unroll_server.repository.watcher import Watcher
from unroll_server.telemetry.metrics import Metrics

LANES = 4


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Bundles of two networks of the same sizes, whose weights differ."""
    root = tmp_path_factory.mktemp("exported")
    return [bundles.export(random_network(seed=seed), root) for seed in range(2)]


@pytest.fixture
def root(exported: list[Path], tmp_path: Path) -> Path:
    """A repository that holds `m/1`."""
    bundles.publish(exported[0], tmp_path / "models", "m", 1)
    return tmp_path / "models"


class Served:
    """A repository, its catalog, engine and watcher.

    Attributes:
        count: Counts the sessions on a version.
        changes: Versions that took new work after each change.
    """

    def __init__(self, root: Path, keep: int | None, poll: float, drain_at_least: float) -> None:
        metrics = Metrics()
        self.engine = AsyncEngine((), max_lanes=LANES, tick_steps=5, max_queued_steps=10**6, metrics=metrics)
        self.catalog = Catalog()
        loader = Loader("onnx", "cpu", LANES)
        self.count: CountSessions = self._no_sessions
        self.repository = Repository(
            root,
            loader,
            self.catalog,
            self.engine,
            metrics,
            count_sessions=lambda key, bundle: self.count(key, bundle),
            on_change=self._on_change,
            keep=keep,
            drain_at_least=drain_at_least,
        )
        self.watcher = Watcher(self.repository, self.catalog, poll)
        self.changes: list[list[str]] = []
        self.changed = asyncio.Event()

    @staticmethod
    async def _no_sessions(_: ModelKey, __: bytes) -> int:
        return 0

    async def _on_change(self) -> None:
        self.changes.append(self.names)
        self.changed.set()

    @property
    def names(self) -> list[str]:
        return [str(model.spec.key) for model in self.catalog.models]

    @property
    def index(self) -> list[tuple[str, int, str]]:
        return [(name, version, state.value) for name, version, state, _ in self.repository.index()]

    async def classify(self, model: Model) -> None:
        """Runs work on a model and checks its bits."""
        values = np.random.default_rng(1).normal(size=(7, model.spec.input_size)).astype(np.float32)
        batch = BatchJob(model, values, np.array([0, 7]))
        await self.engine.run(batch)
        logits, _, _ = alone(model, values, None)
        assert batch.logits.tobytes() == logits[-1:].tobytes()


async def until(holds: Callable[[], bool]) -> None:
    while True:
        if holds():
            return
        await asyncio.sleep(0)


@asynccontextmanager
async def serving(
    root: Path, keep: int | None = None, poll: float = 0.0, drain_at_least: float = 0.0
) -> AsyncIterator[Served]:
    served = Served(root, keep, poll, drain_at_least)
    try:
        await served.repository.open()
        served.watcher.start()
        yield served
    finally:
        served.watcher.close()
        served.repository.close()
        await asyncio.to_thread(served.engine.close)


async def test_a_new_version_takes_new_work_and_a_removed_one_takes_none(root: Path, exported: list[Path]) -> None:
    async with serving(root) as served:
        assert served.names == ["m/1"]
        second = bundles.publish(exported[1], root, "m", 2)
        await served.repository.refresh()
        assert served.catalog.find("m", 0).key.version == 2
        await served.classify(served.catalog.find("m", 2).model)
        bundles.withdraw(second)
        await served.repository.refresh()
        assert served.names == ["m/1"]
        with pytest.raises(ModelNotFoundError, match="m/2 is not served; choose from: 1"):
            served.catalog.find("m", 2)
        bundles.withdraw(root / "m" / "1")
        await served.repository.refresh()
        with pytest.raises(ModelNotFoundError, match="'m' is not served; no model is"):
            served.catalog.find("m", 0)
        with pytest.raises(ModelNotFoundError, match="no model is served"):
            served.catalog.find("", 0)
        assert served.index == []
        assert served.changes == [["m/1"], ["m/1", "m/2"], ["m/1"], []]


async def test_what_did_not_change_is_not_loaded_again(root: Path) -> None:
    async with serving(root) as served:
        before = served.catalog.models
        (root / "m" / "1" / "manifest.json").touch()
        await served.repository.refresh()
        await served.repository.load("m")
        assert served.catalog.models == before
        assert served.changes == [["m/1"]]


async def test_a_held_version_stays_loaded_until_its_last_holder_has_gone(root: Path) -> None:
    async with serving(root) as served:
        version = served.catalog.find("m", 1)
        version.acquire()
        version.acquire()
        bundles.withdraw(root / "m" / "1")
        await served.repository.refresh()
        version.release()
        await served.repository.refresh()
        assert served.index == [("m", 1, "LEAVING")]
        assert served.catalog.find("m", 1, resumes=b"") is version
        with pytest.raises(ModelNotFoundError):
            served.catalog.find("m", 1)
        await served.classify(version.model)
        version.release()
        await until(lambda: version.state is VersionState.UNLOADED)  # without a refresh
        with pytest.raises(ModelNotFoundError):
            served.catalog.find("m", 1, resumes=b"")
        with pytest.raises(ModelNotFoundError, match="m/1 is not served any more"):
            await served.classify(version.model)


async def test_a_version_with_sessions_stays_loaded(root: Path) -> None:
    async with serving(root) as served:
        sessions: dict[ModelKey, int] = {ModelKey("m", 1): 1}

        async def count(key: ModelKey, bundle: bytes) -> int:
            if sessions[key] < 0:
                raise SessionStoreError("the store does not answer")
            return sessions[key]

        served.count = count
        bundles.withdraw(root / "m" / "1")
        for left in (1, -1, 1):
            sessions[ModelKey("m", 1)] = left
            await served.repository.refresh()
            assert served.index == [("m", 1, "LEAVING")]
        sessions[ModelKey("m", 1)] = 0
        await served.repository.refresh()
        assert served.index == []


async def test_a_version_stays_for_a_session_that_is_stored_while_they_are_counted(root: Path) -> None:
    async with serving(root) as served:
        version = served.catalog.find("m", 1)
        stored: list[str] = []

        async def count(key: ModelKey, bundle: bytes) -> int:
            before = len(stored)
            if not before:
                with version.acquired():
                    stored.append("session")
            return before

        served.count = count
        bundles.withdraw(root / "m" / "1")
        await served.repository.refresh()
        await served.repository.refresh()
        assert served.index == [("m", 1, "LEAVING")]


async def test_a_version_replaced_in_place_serves_new_work_and_the_old_content_its_sequences(
    root: Path, exported: list[Path]
) -> None:
    async with serving(root) as served:
        old = served.catalog.find("m", 1)
        old.acquire()
        bundles.publish(exported[1], root, "m", 1)
        await served.repository.refresh()
        new = served.catalog.find("m", 1)
        assert new is not old
        assert new.bundle != old.bundle
        for bundle, version in ((new.bundle, new), (old.bundle, old), (b"", new), (b"other", new), (None, new)):
            assert served.catalog.find("m", 1, resumes=bundle) is version
        await served.classify(old.model)
        await served.classify(new.model)
        assert served.index == [("m", 1, "READY")]
        old.release()
        await served.repository.refresh()
        assert served.index == [("m", 1, "READY")]
        await served.classify(new.model)


async def test_a_bad_version_is_refused_once_and_tried_again_when_its_files_change(
    root: Path, exported: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(root) as served:
        good = (exported[1] / "model.onnx").read_bytes()
        second = bundles.publish(exported[1], root, "m", 2, lambda it: (it / "model.onnx").write_bytes(good[:-1]))
        for _ in range(3):
            await served.repository.refresh()
        assert served.names == ["m/1"]
        assert served.index == [("m", 1, "READY"), ("m", 2, "REFUSED")]
        (refused,) = [entry for entry in served.repository.index() if entry.state == "REFUSED"]
        assert "model.onnx" in refused.reason
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1
        assert refused.reason in errors[0].getMessage()
        (second / "model.onnx").write_bytes(good)
        await served.repository.refresh()
        assert served.index == [("m", 1, "READY"), ("m", 2, "READY")]


async def test_a_version_that_is_spoilt_in_place_is_served_on_as_it_was(root: Path) -> None:
    async with serving(root) as served:
        version = served.catalog.find("m", 1)
        (root / "m" / "1" / "model.ts").write_bytes(b"")
        await served.repository.refresh()
        assert served.catalog.find("m", 1) is version
        (entry,) = served.repository.index()
        assert entry.state == "READY"
        assert "model.ts" in entry.reason
        await served.classify(version.model)


@pytest.mark.parametrize("keep", [1, 2])
async def test_the_latest_good_versions_are_kept(root: Path, exported: list[Path], keep: int) -> None:
    for version in (2, 3, 10):
        bundles.publish(exported[0], root, "m", version)
    bundles.publish(exported[1], root, "other", 7)
    async with serving(root, keep) as served:
        assert served.names == [["m/10", "other/7"], ["m/3", "m/10", "other/7"]][keep - 1]
        bundles.publish(exported[0], root, "m", 11, lambda it: (it / "parity.json").unlink())
        await served.repository.refresh()
        assert served.names == [["m/10", "other/7"], ["m/3", "m/10", "other/7"]][keep - 1]
        bundles.publish(exported[0], root, "m", 11)
        await served.repository.refresh()
        assert served.names == [["m/11", "other/7"], ["m/10", "m/11", "other/7"]][keep - 1]
        bundles.withdraw(root / "m" / "11")
        await served.repository.refresh()
        assert served.names == [["m/10", "other/7"], ["m/3", "m/10", "other/7"]][keep - 1]


async def test_an_unloaded_model_stays_out_until_it_is_loaded(root: Path, exported: list[Path]) -> None:
    bundles.publish(exported[1], root, "other", 1)
    async with serving(root) as served:
        await served.repository.unload("m")
        await served.repository.refresh()
        assert served.names == ["other/1"]
        with pytest.raises(ModelNotFoundError):
            await served.repository.unload("m")
        bundles.publish(exported[1], root, "m", 2)
        await served.repository.refresh()
        assert served.names == ["other/1"]
        await served.repository.load("m")
        assert served.names == ["m/1", "m/2", "other/1"]
        with pytest.raises(ModelNotFoundError, match="'none' is not in the repository"):
            await served.repository.load("none")


async def test_loading_a_bad_model_says_why(root: Path, exported: list[Path]) -> None:
    async with serving(root) as served:
        bundles.publish(exported[0], root, "bad", 1, lambda it: (it / "weights.safetensors").unlink())
        for _ in range(2):
            with pytest.raises(ModelRefusedError, match=r"weights\.safetensors"):
                await served.repository.load("bad")


async def test_a_folder_that_is_gone_says_nothing_of_what_is_served(root: Path) -> None:
    async with serving(root) as served:
        root.rename(root.with_name("elsewhere"))  # noqa: ASYNC240
        await served.repository.refresh()
        assert served.names == ["m/1"]
        with pytest.raises(ModelRefusedError, match="can't be read"):
            await served.repository.load("m")


async def test_a_model_folder_that_cant_be_read_says_nothing_of_what_is_served(
    root: Path, exported: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    bundles.publish(exported[1], root, "other", 1)
    async with serving(root) as served:
        (root / "m").rename(root / ".away")
        (root / "m").symlink_to("m")  # listing it fails, to whoever may read everything too
        for _ in range(2):
            await served.repository.refresh()
            assert served.names == ["m/1", "other/1"]
        (error,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert f"{str(root / 'm')!r} can't be read: " in error
        with pytest.raises(ModelRefusedError, match="can't be read"):
            await served.repository.load("m")
        (root / "m").unlink()
        (root / ".away").rename(root / "m")
        bundles.withdraw(root / "m" / "1")
        bundles.publish(exported[1], root, "m", 2)
        await served.repository.refresh()
        assert served.names == ["m/2", "other/1"]


async def test_a_link_that_leads_nowhere_says_nothing_of_the_versions_beside_it(root: Path) -> None:
    async with serving(root) as served:
        (root / "m" / "2").symlink_to("a" * 300)  # longer than a name can be
        await served.repository.refresh()
        assert served.index == [("m", 1, "READY"), ("m", 2, "REFUSED")]


@pytest.mark.parametrize("folder", [b"m/4294967296", b"m/20261122235959", b"\xff\xfe/1", b"two\nlines/1", b"\x1b[2J/1"])
async def test_versions_that_cant_be_named_are_passed_over_and_logged_once(
    root: Path, exported: list[Path], folder: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(root) as served:
        made = Path(os.fsdecode(os.fsencode(root) + b"/" + folder))
        made.parent.mkdir(exist_ok=True)
        bundles.publish(exported[1], root.parent, "m", 1).rename(made)
        for _ in range(3):
            await served.repository.refresh()
        assert served.index == [("m", 1, "READY")]
        (error,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert error.startswith(f"passed over: {str(made)!r}: the ")
        assert error.isprintable()


async def test_a_name_that_no_model_can_have_is_refused(root: Path, exported: list[Path]) -> None:
    bundles.publish(exported[1], root, "my model", 1)
    async with serving(root) as served:
        (refused,) = [entry for entry in served.repository.index() if entry.name == "my model"]
        assert "model name 'my model': 1 to 64 letters" in refused.reason


async def test_the_folder_is_watched(root: Path, exported: list[Path]) -> None:
    async with serving(root, poll=0.01) as served:
        for version in (2, 3):
            served.changed.clear()
            bundles.publish(exported[1], root, "m", version)
            await served.changed.wait()
            assert served.names[-1] == f"m/{version}"


@pytest.mark.parametrize(
    "name", ["m/01", "m/0", "m/latest", "m/4294967296", ".hidden/1", "m/.tmp-1", "a\nb/1", "\udcff/1"]
)
async def test_other_folders_are_no_versions(root: Path, exported: list[Path], name: str) -> None:
    (root / name).parent.mkdir(exist_ok=True)
    async with serving(root) as served:
        bundles.publish(exported[1], root, "m", 2).rename(root / name)
        await served.repository.refresh()
        assert served.index == [("m", 1, "READY")]


async def test_links_that_lead_out_of_the_repository_are_refused(root: Path, exported: list[Path]) -> None:
    outside = bundles.publish(exported[1], root.parent / "outside", "m", 2)
    (root / "m" / "2").symlink_to(outside)
    bundles.publish(exported[1], root.parent / "outside", "linked", 1)
    (root / "linked").symlink_to(root.parent / "outside" / "linked")
    inside = bundles.publish(exported[1], root, "m", 3)
    inside.rename(root / ".kept")
    (root / "m" / "3").symlink_to(root / ".kept")
    (root / "m" / "4").symlink_to(root / "m" / "4")
    async with serving(root) as served:
        assert served.names == ["m/1", "m/3"]
        reasons = {(name, version): reason for name, version, _, reason in served.repository.index() if reason}
        assert reasons.keys() == {("m", 2), ("linked", 1)}
        assert all("a link out of the repository" in reason for reason in reasons.values())


async def test_nothing_good_is_no_start(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (root / "m" / "1" / "parity.json").write_text("{}")
    for folder, says in [
        (tmp_path / "empty", "holds no bundle"),
        (tmp_path / "none", "is not a folder"),
        (root, "no bundle under .* can be served: .*parity.json"),
    ]:
        with pytest.raises(StartupError, match=says):
            async with serving(folder):
                pass


async def test_reloads_leave_nothing_behind(root: Path, exported: list[Path]) -> None:
    async with serving(root) as served:
        gc.collect()
        gc.disable()  # what goes, goes by itself: a collection is seldom while serving
        try:
            gone = []
            for turn in range(20):
                model = served.catalog.find("m", 0).model
                await served.classify(model)
                gone.append(weakref.ref(model.runtime))
                del model
                bundles.publish(exported[turn % 2 - 1], root, "m", 1)
                await served.repository.refresh()
                # The engine lets go in its own time, which the next work of another model comes after.
                await served.classify(served.catalog.find("m", 0).model)
            # The thread may still be on its way out of the last loading.
            await until(lambda: not any(runtime() for runtime in gone))
        finally:
            gc.enable()


async def test_what_another_process_may_know_already_is_looked_for_once(exported: list[Path], root: Path) -> None:
    async with serving(root) as served:
        assert served.names == ["m/1"]
        await served.repository.refresh_for(ModelKey("m", 2))
        assert served.changes == [["m/1"]]
        bundles.publish(exported[0], root, "m", 2)
        await asyncio.gather(*(served.repository.refresh_for(ModelKey("m", 2)) for _ in range(5)))
        assert served.names == ["m/1", "m/2"]
        bundles.publish(exported[1], root, "m", 2)
        old = served.catalog.find("m", 2)
        await served.repository.refresh_for(ModelKey("m", 2))
        assert served.catalog.find("m", 2).bundle != old.bundle
        assert len(served.changes) == 3


async def test_a_version_that_leaves_waits_for_processes_that_have_not_looked_yet(
    exported: list[Path], root: Path
) -> None:
    async with serving(root, keep=1, drain_at_least=3600) as served:
        bundles.publish(exported[1], root, "m", 2)
        await served.repository.refresh()
        await served.repository.refresh()
        assert served.index == [("m", 1, "LEAVING"), ("m", 2, "READY")]
