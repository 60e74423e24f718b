"""Who may call and how much: the file of identities, their hashed tokens and their limits, read again on a change."""

import hashlib
import logging
import re
import threading
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unroll_server.errors import StartupError

_log = logging.getLogger(__name__)

LARGEST_FILE = 16 * 2**20
"""Bytes of a file of identities, at most."""
_HASH = re.compile(r"sha256:[0-9a-f]{64}", re.IGNORECASE)
_NAME = re.compile(r"[!-~]{1,128}")
_LIMITS = ("max_concurrent_calls", "max_queued_steps", "max_open_sequences", "max_sessions")


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller, and what it may have at once; None is as much as the server allows anybody.

    Attributes:
        name: What it is called; empty where callers are not told apart.
        admin: Whether it may call the admin listener.
        max_concurrent_calls: Calls in flight, streams included.
        max_queued_steps: Timesteps accepted and not yet answered.
        max_open_sequences: Sequences open, over all its streams.
        max_sessions: Sessions kept for it.
    """

    name: str
    admin: bool = False
    max_concurrent_calls: int | None = None
    max_queued_steps: int | None = None
    max_open_sequences: int | None = None
    max_sessions: int | None = None


def digest_of(token: str) -> bytes:
    """What is kept of a token: its SHA-256. Tokens are long and random, so that nothing slower is needed."""
    return hashlib.sha256(token.encode()).digest()


class IdentitiesError(Exception):
    """The file can't be used; the message names the entry."""


@dataclass(frozen=True, slots=True)
class _Contents:
    by_token: Mapping[bytes, Identity]
    by_name: Mapping[str, Identity]
    anyone: Identity


def parse(text: str) -> _Contents:
    """Reads a file of identities; docs/security.md describes it.

    Raises:
        IdentitiesError: it is no TOML, or an entry is wrong.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise IdentitiesError(f"no TOML: {error}") from None
    for name in document.keys() - {"defaults", "identities"}:
        raise IdentitiesError(f"{name!r} is not known; there can be [defaults] and [identities.NAME]")
    anyone = replace(Identity(""), **_limits("defaults", _table("defaults", document.get("defaults", {}))))
    by_token: dict[bytes, Identity] = {}
    by_name: dict[str, Identity] = {}
    for name, entry in _table("identities", document.get("identities", {})).items():
        place = f"identities.{name}"
        if not _NAME.fullmatch(name):
            raise IdentitiesError(f"{place}: a name is 1 to 128 visible ASCII characters")
        options = dict(_table(place, entry))
        admin, tokens = options.pop("admin", False), options.pop("tokens", [])
        if not isinstance(admin, bool):
            raise IdentitiesError(f"{place}: admin is true or false")
        identity = replace(anyone, name=name, admin=admin, **_limits(place, options))
        by_name[name] = identity
        for digest in _digests(place, tokens):
            if digest in by_token:
                raise IdentitiesError(f"{place}: {by_token[digest].name} has one of its tokens")
            by_token[digest] = identity
    return _Contents(by_token, by_name, anyone)


def _table(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise IdentitiesError(f"{place}: a table is expected")
    return value


def _limits(place: str, options: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        if name not in _LIMITS:
            raise IdentitiesError(f"{place}: {name!r} is not known")
        # A bool is an int to Python.
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise IdentitiesError(f"{place}: {name} is a whole number from 0 on")
    return dict(options)


def _digests(place: str, tokens: Any) -> Iterator[bytes]:
    if not isinstance(tokens, list):
        raise IdentitiesError(f"{place}: tokens is a list")
    for token in tokens:
        # It is not repeated: it may be a token that somebody forgot to hash.
        if not isinstance(token, str) or not _HASH.fullmatch(token):
            raise IdentitiesError(f"{place}: a token is given as 'sha256:' and 64 hexadecimal digits")
        digest = bytes.fromhex(token.partition(":")[2])
        # What a script hashes whose variable is not set; it would let in whoever sends no more than "Bearer".
        if digest == digest_of(""):
            raise IdentitiesError(f"{place}: a token is empty, by its hash")
        yield digest


class Identities:
    """Those of a file, which may change at any time. Any thread may use it.

    Args:
        path: The file; None where there is none, and nobody has a token or a limit.

    Attributes:
        version: Grows whenever others are known.

    Raises:
        StartupError: the file can't be read or used.
    """

    def __init__(self, path: Path | None) -> None:
        self.version = 0
        self._path = path
        self._lock = threading.Lock()
        self._seen: object = None
        self._contents = _Contents({}, {}, Identity(""))
        if path is None:
            return
        try:
            self._seen, self._contents = _signature(path), _read(path)
        except IdentitiesError as error:
            raise StartupError(f"--tokens: {path}: {error}") from None

    @property
    def have_tokens(self) -> bool:
        """Whether there is a file, and so a call needs credentials."""
        return self._path is not None

    def of_token(self, digest: bytes) -> Identity | None:
        """Whose token it is, by its hash: what a lookup tells by its time is of no use to who guesses tokens."""
        return self._contents.by_token.get(digest)

    def named(self, name: str) -> Identity:
        """What is known of an identity; one that the file does not name has the limits of `[defaults]`."""
        known = self._contents.by_name.get(name)
        if known is not None:
            return known
        return replace(self._contents.anyone, name=name) if name else Identity("")

    def reload(self) -> None:
        """Reads the file again if it has changed.

        A file that can't be used leaves everything as it was; the log says so, once.
        """
        with self._lock:
            if self._path is None or (signature := _signature(self._path)) == self._seen:
                return
            self._seen = signature
            try:
                contents = _read(self._path)
            except IdentitiesError as error:
                _log.error("--tokens: %s: %s; what was read before still holds", self._path, error)
                return
            if contents != self._contents:
                self._contents = contents
                self.version += 1
                _log.info("--tokens: %s read again: %d identities", self._path, len(contents.by_name))


def _signature(path: Path) -> object:
    """What changes when a file is written or replaced; None where it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size, stat.st_dev


def _read(path: Path) -> _Contents:
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise IdentitiesError((error.strerror or "can't be read").lower()) from None
    if len(raw) > LARGEST_FILE:
        raise IdentitiesError(f"longer than {LARGEST_FILE} bytes")
    try:
        return parse(raw.decode())
    except UnicodeDecodeError:
        raise IdentitiesError("not UTF-8") from None
