"""Draining versions: unloaded once no sequence and no session is on them."""

from pathlib import Path

import pytest
from support import bundles
from support.repositories import serving
from support.waiting import until

from unroll_engine.errors import ModelNotFoundError
from unroll_engine.models.spec import ModelKey
from unroll_server.errors import SessionStoreError
from unroll_server.repository.version import VersionState


async def test_a_version_stays_loaded_until_its_last_sequence_ends(root: Path) -> None:
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
        with pytest.raises(ModelNotFoundError, match="m/1 is no longer served"):
            await served.classify(version.model)


async def test_a_version_with_sessions_stays_loaded(root: Path) -> None:
    async with serving(root) as served:
        sessions: dict[ModelKey, int] = {ModelKey("m", 1): 1}

        async def count(key: ModelKey, bundle: bytes) -> int:
            if sessions[key] < 0:
                raise SessionStoreError("the store does not answer")
            return sessions[key]

        served.count_sessions = count
        bundles.withdraw(root / "m" / "1")
        for left in (1, -1, 1):
            sessions[ModelKey("m", 1)] = left
            await served.repository.refresh()
            assert served.index == [("m", 1, "LEAVING")]
        sessions[ModelKey("m", 1)] = 0
        await served.repository.refresh()
        assert served.index == []


async def test_a_version_stays_loaded_for_a_session_stored_during_the_count(root: Path) -> None:
    async with serving(root) as served:
        version = served.catalog.find("m", 1)
        stored: list[str] = []

        async def count(key: ModelKey, bundle: bytes) -> int:
            before = len(stored)
            if not before:
                with version.acquired():
                    stored.append("session")
            return before

        served.count_sessions = count
        bundles.withdraw(root / "m" / "1")
        await served.repository.refresh()
        await served.repository.refresh()
        assert served.index == [("m", 1, "LEAVING")]


async def test_a_version_drains_at_least_as_long_as_other_processes_may_use_it(
    exported: list[Path], root: Path
) -> None:
    async with serving(root, keep=1, drain_at_least=3600) as served:
        bundles.publish(exported[1], root, "m", 2)
        await served.repository.refresh()
        await served.repository.refresh()
        assert served.index == [("m", 1, "LEAVING"), ("m", 2, "READY")]
