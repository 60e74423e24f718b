"""Which store `--sessions` names."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from unroll_server.config import Settings
from unroll_server.errors import StartupError
from unroll_server.sessions.lasting import LastingStore
from unroll_server.sessions.memory import MemoryStore
from unroll_server.sessions.store import Store

SHARED = "shared:"
"""What a parent makes of `memory` for its workers: before the path of the database that they share."""


def open_store(settings: Settings, count: Callable[[str], None] = lambda _: None) -> Store:
    """Opens the store that the settings name; one that is somewhere else need not be there yet.

    Args:
        settings: What was asked for.
        count: Told "evicted" when a session has made room.

    Raises:
        StartupError: there can be none.
    """
    ttl, most, file = settings.session_ttl, settings.tuning.max_sessions, settings.sessions_file
    if settings.sessions.startswith(SHARED):
        return MemoryStore(ttl, most, Path(settings.sessions.removeprefix(SHARED)), count)
    if settings.sessions == "memory":
        return LastingStore(ttl, most, None, file, count) if file else MemoryStore(ttl, most, None, count)
    if importlib.util.find_spec("redis") is None:
        raise StartupError("--sessions: redis is missing; install unroll-server[redis]")
    from unroll_server.sessions.redis_store import RedisStore

    return RedisStore(settings.sessions, settings.session_ttl)


def shared_store(settings: Settings, folder: Path) -> tuple[Settings, Store | None]:
    """Where several processes are to keep their sessions.

    Args:
        settings: What was asked for.
        folder: Where this parent's workers have their files.

    Returns:
        The settings for the workers, and what the parent itself has to open and close around their lives.

    Raises:
        StartupError: there can be no such place.
    """
    if settings.sessions != "memory":
        return settings, None
    ttl, most, file = settings.session_ttl, settings.tuning.max_sessions, settings.sessions_file
    path = folder / "sessions"
    store = LastingStore(ttl, most, path, file) if file else MemoryStore(ttl, most, path)
    return settings.replace(sessions=f"{SHARED}{path}", sessions_file=None), store
