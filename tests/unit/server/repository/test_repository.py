"""The repository: versions that are served follow the folder."""

import asyncio
import gc
import logging
import weakref
from pathlib import Path

import pytest
from support import bundles
from support.repositories import serving
from support.waiting import until

from unroll_engine.errors import ModelNotFoundError
from unroll_engine.models.spec import ModelKey
from unroll_server.errors import ModelRefusedError, StartupError


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
        await until(lambda: served.loads("loaded") == {}, lambda: served.loads("loaded"))


async def test_an_unchanged_version_is_not_loaded_again(root: Path) -> None:
    async with serving(root) as served:
        before = served.catalog.models
        (root / "m" / "1" / "manifest.json").touch()
        await served.repository.refresh()
        await served.repository.load("m")
        assert served.catalog.models == before
        assert served.changes == [["m/1"]]


async def test_after_a_replacement_in_place_sequences_stay_on_the_old_content(root: Path, exported: list[Path]) -> None:
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


async def test_a_bad_version_is_refused_once_and_loaded_when_its_files_change(
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
        assert served.loads("refused") == {"m/1": 0, "m/2": 1}
        bundles.withdraw(second)
        await served.repository.refresh()
        assert served.loads("refused") == {"m/1": 0}
        bundles.publish(exported[1], root, "m", 2, lambda it: (it / "model.onnx").write_bytes(good[:-1]))
        await served.repository.refresh()
        (second / "model.onnx").write_bytes(good)
        await served.repository.refresh()
        assert served.index == [("m", 1, "READY"), ("m", 2, "READY")]


async def test_a_version_corrupted_in_place_is_still_served_as_it_was(root: Path) -> None:
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
async def test_the_latest_good_versions_are_served(root: Path, exported: list[Path], keep: int) -> None:
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


async def test_an_unloaded_model_is_not_served_until_it_is_loaded(root: Path, exported: list[Path]) -> None:
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


async def test_loading_a_bad_model_reports_the_reason(root: Path, exported: list[Path]) -> None:
    async with serving(root) as served:
        bundles.publish(exported[0], root, "bad", 1, lambda it: (it / "weights.safetensors").unlink())
        for _ in range(2):
            with pytest.raises(ModelRefusedError, match=r"weights\.safetensors"):
                await served.repository.load("bad")


async def test_without_a_good_version_there_is_no_start(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (root / "m" / "1" / "parity.json").write_text("{}")
    for folder, message in [
        (tmp_path / "empty", "holds no bundle"),
        (tmp_path / "none", "is not a folder"),
        (root, "no bundle under .* can be served: .*parity.json"),
    ]:
        with pytest.raises(StartupError, match=message):
            async with serving(folder):
                pass


async def test_reloads_leak_nothing(root: Path, exported: list[Path]) -> None:
    async with serving(root) as served:
        gc.collect()
        gc.disable()  # collections are rare while serving, so nothing may depend on them
        try:
            gone = []
            for turn in range(20):
                model = served.catalog.find("m", 0).model
                await served.classify(model)
                gone.append(weakref.ref(model.runtime))
                del model
                bundles.publish(exported[turn % 2 - 1], root, "m", 1)
                await served.repository.refresh()
                # The engine drops the old model before it runs later work of another.
                await served.classify(served.catalog.find("m", 0).model)
            # The thread may still be leaving the last load.
            await until(lambda: not any(runtime() for runtime in gone))
        finally:
            gc.enable()


async def test_a_version_that_another_process_serves_is_loaded_once(exported: list[Path], root: Path) -> None:
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
