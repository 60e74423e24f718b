"""Sessions that outlive their process: saved completely, loaded once, refused if a single bit is wrong."""

import asyncio
import logging
import os
import sqlite3
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unroll_proto.v1.session_pb2 import Session
from unroll_server.errors import SessionExpiredError, SessionsLostError, StartupError
from unroll_server.sessions.clock import Moment
from unroll_server.sessions.file_store import FileBackedStore


class Clock:
    """The clocks of a machine: `wall` can be set, and `boot` restarts the monotonic one."""

    def __init__(self) -> None:
        self.wall, self.monotonic, self.boots = 1e9, 5000.0, 1

    def __call__(self) -> Moment:
        return Moment(self.wall, self.monotonic, f"boot {self.boots}")

    def advance(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds

    def boot(self, seconds: float) -> None:
        """Boots the machine, which takes some seconds."""
        self.wall += seconds
        self.monotonic, self.boots = 10.0, self.boots + 1


def session(session_id: str, step: int = 0, ended: bool = False) -> Session:
    made = Session(format=1, owner="ann", session_id=session_id, ended=ended)
    made.snapshot.model, made.snapshot.version, made.snapshot.step = "m", 1, step
    made.snapshot.state.append(bytes(range(64)))
    return made


def opened(file: Path, clock: Clock, most: int = 100) -> FileBackedStore:
    return FileBackedStore(100, most, None, file, moment=clock)


async def test_the_file_is_never_readable_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    replace_with = Path.replace

    def watched(self: Path, target: Path) -> Path:
        modes.append(stat.S_IMODE(self.stat().st_mode))
        return replace_with(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    store = opened(tmp_path / "sessions", Clock())
    assert await store.put(session("s"), None)
    await store.close()
    assert modes == [0o600]
    assert stat.S_IMODE((tmp_path / "sessions").stat().st_mode) == 0o600


async def test_sessions_come_back_with_the_time_that_is_left_to_them(tmp_path: Path) -> None:
    clock, file = Clock(), tmp_path / "sessions"
    store = opened(file, clock, most=3)
    for name in ("pushed out", "old", "new", "newer", "ended"):
        clock.advance(20)
        assert await store.put(session(name, 7, ended=name == "ended"), None)
    await store.close()
    await store.close()
    assert os.listdir(tmp_path) == ["sessions"]  # noqa: PTH208 (ruff wants no pathlib in a coroutine)
    clock.advance(45)
    store = opened(file, clock)
    # Until this server serves, another one can still load the file.
    assert file.exists()
    store.confirm_takeover()
    assert not file.exists()
    found = await store.get("ann", "new")
    assert found is not None
    assert found.session == session("new", 7)
    with pytest.raises(SessionExpiredError, match="unused for more than"):
        await store.get("ann", "old")
    with pytest.raises(SessionExpiredError, match="made room"):
        await store.get("ann", "pushed out")
    assert await store.get("ann", "ended") is None
    await store.close()


@pytest.mark.parametrize(
    ("booted", "down", "step", "left"),
    [
        # While the machine keeps running, a step of its wall clock changes nothing.
        (False, 30, 7200, 70),
        (False, 30, -7200, 70),
        (False, 110, -7200, None),
        # After a boot only the wall clock measures the time: a step forward counts as time, a step back hides it.
        (True, 30, 0, 70),
        (True, 110, 0, None),
        (True, 30, -7200, 100),
        (True, 30, 50, 20),
        (True, 30, 90, None),
    ],
)
async def test_time_while_no_server_runs_counts(
    tmp_path: Path, booted: bool, down: float, step: float, left: float | None
) -> None:
    clock, file = Clock(), tmp_path / "sessions"
    store = opened(file, clock)
    clock.wall -= 86400
    assert await store.put(session("first"), None)
    assert await store.put(session("s"), None)
    clock.wall += 86400
    await store.close()
    (clock.boot if booted else clock.advance)(down)
    clock.wall += step
    store = opened(file, clock)
    listed = await store.listed(10)
    assert [each.session_id for each in listed] == ([] if left is None else ["s", "first"])
    assert all(each.expires_in == pytest.approx(left) for each in listed)
    if left is None:
        with pytest.raises(SessionExpiredError, match="unused for more than"):
            await store.get("ann", "s")
    else:
        # Sessions of the file were used before any other.
        assert await store.put(session("new"), None)
        assert [each.session_id for each in await store.listed(10)] == ["new", "s", "first"]
    await store.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("saved") / "sessions"

    async def save() -> None:
        store = opened(file, Clock())
        for n in range(3):
            assert await store.put(session(f"s{n}", n), None)
        await store.close()

    asyncio.run(save())
    return file.read_bytes()


@settings(max_examples=80)
@given(data=st.data())
def test_a_file_that_was_cut_or_changed_is_put_aside_and_the_server_starts(
    saved: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("broken") / "sessions"
    broken = bytearray(saved)
    at = data.draw(st.integers(0, len(saved) - 1))
    change = data.draw(st.sampled_from(["flip", "cut", "insert", "append"]))
    if change == "flip":
        broken[at] ^= 1 << data.draw(st.integers(0, 7))
    elif change == "cut":
        del broken[at:]
    elif change == "insert":
        broken[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    else:
        broken += data.draw(st.binary(min_size=1, max_size=8))
    if bytes(broken) == saved:
        return
    file.write_bytes(broken)

    async def check() -> None:
        store = opened(file, Clock())
        assert await store.listed(10) == []
        assert await store.put(session("s0"), None)
        await store.close()

    asyncio.run(check())
    assert file.with_name("sessions.refused").read_bytes() == broken


def test_the_log_has_the_reason_if_a_file_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "sessions"
    file.write_bytes(b"unroll sessions 2\n")
    with caplog.at_level(logging.ERROR):
        opened(file, Clock())
    assert "refused the sessions of" in caplog.text
    assert "or of another format" in caplog.text


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_only_a_regular_file_is_read_or_put_aside(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "sessions"
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.mkdir()
    with pytest.raises(StartupError, match=r"--sessions-file: can't write .*: needs a writable folder"):
        opened(file, Clock())
    assert [path.name for path in tmp_path.iterdir()] == ["sessions"]


def test_a_file_that_cannot_be_put_aside_ends_the_start(tmp_path: Path) -> None:
    file = tmp_path / "sessions"
    file.write_bytes(b"something else")
    (tmp_path / "sessions.refused").mkdir()
    with pytest.raises(StartupError, match=r"--sessions-file: can't replace .*: Is a directory"):
        opened(file, Clock())
    assert file.read_bytes() == b"something else"


async def test_a_link_stays_and_its_target_is_never_read_twice(tmp_path: Path) -> None:
    target, link = tmp_path / "volume" / "sessions", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(target)
    for step in range(3):
        store = opened(link, Clock())
        store.confirm_takeover()
        assert link.is_symlink()
        assert not target.exists()
        found = await store.get("ann", "s")
        assert (found.session.snapshot.step if found else 0) == step
        assert await store.put(session("s", step + 1), found.revision if found else None)
        await store.close()
        assert link.is_symlink()
        assert target.is_file()


async def test_sessions_that_cannot_be_saved_are_an_error_and_the_store_is_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "volume" / "sessions"
    file.parent.mkdir()
    store = opened(file, Clock())
    assert await store.put(session("s"), None)
    file.parent.rmdir()
    with pytest.raises(SessionsLostError, match=r"the sessions are lost: can't write .*: No such file"):
        await store.close()
    assert "the sessions are lost" in caplog.text
    await store.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        await store.get("ann", "s")
