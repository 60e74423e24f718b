"""Opens the store that `--sessions` names."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from unroll_server.config import Settings
from unroll_server.errors import StartupError
from unroll_server.sessions.file_store import FileBackedStore
from unroll_server.sessions.memory_store import MemoryStore
from unroll_server.sessions.store import Store

SHARED = "shared:"
"""Prefix of `--sessions` for workers that share a table, before the path of its file."""


def open_store(settings: Settings, count: Callable[[str], None] = lambda _: None) -> Store:
    """Opens the store that the settings name; a remote one need not be reachable yet.

    Args:
        settings: Settings of the server.
        count: Called with "evicted" when a session made room for another.

    Raises:
        StartupError: the store can't be opened.
    """
    if settings.sessions.startswith(SHARED):
        path = Path(settings.sessions.removeprefix(SHARED))
        return MemoryStore(settings.session_ttl, settings.tuning.max_sessions, path, count)
    if settings.sessions == "memory":
        return _memory_store(settings, None, count)
    if importlib.util.find_spec("redis") is None:
        raise StartupError("--sessions: redis is not installed; install unroll-server[redis]")
    from unroll_server.sessions.redis_store import RedisStore

    return RedisStore(settings.sessions, settings.session_ttl)


def open_shared_store(settings: Settings, folder: Path) -> tuple[Settings, Store | None]:
    """Opens the store that workers share, if they need one of their supervisor.

    Args:
        settings: Settings of the server.
        folder: Folder of the workers' files.

    Returns:
        Settings for the workers, and the store that the supervisor closes after them; None if it needs none.

    Raises:
        StartupError: the store can't be opened.
    """
    if settings.sessions != "memory":
        return settings, None
    path = folder / "sessions"
    store = _memory_store(settings, path, lambda _: None)
    return settings.replace(sessions=f"{SHARED}{path}", sessions_file=None), store


def _memory_store(settings: Settings, path: Path | None, count: Callable[[str], None]) -> MemoryStore:
    ttl, most, file = settings.session_ttl, settings.tuning.max_sessions, settings.sessions_file
    return FileBackedStore(ttl, most, path, file, count) if file else MemoryStore(ttl, most, path, count)
