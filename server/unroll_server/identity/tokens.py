"""The file of identities: their hashed tokens and quotas, reloaded when it changes."""

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

MAX_FILE_BYTES = 16 * 2**20
"""Largest size of the file."""
_HASH = re.compile(r"sha256:[0-9a-f]{64}", re.IGNORECASE)
_NAME = re.compile(r"[!-~]{1,128}")
_QUOTAS = ("max_concurrent_calls", "max_queued_steps", "max_open_sequences", "max_sessions")


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller and its quotas: maximums at any time; None for no quota.

    Attributes:
        name: Name of the identity; empty without authentication.
        admin: True if it may call the admin listener.
        max_concurrent_calls: Most calls in flight, streams included.
        max_queued_steps: Most timesteps queued in the engine of each process.
        max_open_sequences: Most sequences open, over all its streams.
        max_sessions: Most sessions.
    """

    name: str
    admin: bool = False
    max_concurrent_calls: int | None = None
    max_queued_steps: int | None = None
    max_open_sequences: int | None = None
    max_sessions: int | None = None


def digest_of(token: str) -> bytes:
    """Returns the hash of a token, its SHA-256. A slower hash is not needed, since tokens are long and random."""
    return hashlib.sha256(token.encode()).digest()


class IdentitiesError(Exception):
    """The file is invalid; the message names the entry."""


@dataclass(frozen=True, slots=True)
class _Contents:
    by_token: Mapping[bytes, Identity]
    by_name: Mapping[str, Identity]
    anyone: Identity


def parse(text: str) -> _Contents:
    """Parses a file of identities, as in docs/security.md.

    Raises:
        IdentitiesError: it is not TOML, or an entry is invalid.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise IdentitiesError(f"not TOML: {error}") from None
    for name in document.keys() - {"defaults", "identities"}:
        raise IdentitiesError(f"{name}: unknown; expected [defaults] or [identities.NAME]")
    anyone = replace(Identity(""), **_quotas("defaults", _table("defaults", document.get("defaults", {}))))
    by_token: dict[bytes, Identity] = {}
    by_name: dict[str, Identity] = {}
    for name, entry in _table("identities", document.get("identities", {})).items():
        place = f"identities.{name}"
        if not _NAME.fullmatch(name):
            raise IdentitiesError(f"{place}: the name must have 1 to 128 visible ASCII characters")
        options = dict(_table(place, entry))
        admin, tokens = options.pop("admin", False), options.pop("tokens", [])
        if not isinstance(admin, bool):
            raise IdentitiesError(f"{place}.admin: must be true or false")
        identity = replace(anyone, name=name, admin=admin, **_quotas(place, options))
        by_name[name] = identity
        for digest in _digests(place, tokens):
            if digest in by_token:
                raise IdentitiesError(f"{place}.tokens: {by_token[digest].name} has one of these tokens too")
            by_token[digest] = identity
    return _Contents(by_token, by_name, anyone)


def _table(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise IdentitiesError(f"{place}: must be a table")
    return value


def _quotas(place: str, options: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        if name not in _QUOTAS:
            raise IdentitiesError(f"{place}.{name}: unknown; expected one of {', '.join(_QUOTAS)}")
        # bool is a subclass of int.
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise IdentitiesError(f"{place}.{name}: must be a whole number, 0 or more")
    return dict(options)


def _digests(place: str, tokens: Any) -> Iterator[bytes]:
    if not isinstance(tokens, list):
        raise IdentitiesError(f"{place}.tokens: must be a list")
    for token in tokens:
        # The value is not repeated: it may be a token that was not hashed.
        if not isinstance(token, str) or not _HASH.fullmatch(token):
            raise IdentitiesError(f"{place}.tokens: each must be 'sha256:' and 64 hexadecimal digits")
        digest = bytes.fromhex(token.partition(":")[2])
        # A script with an unset variable would hash it; it would admit a caller that sends only "Bearer".
        if digest == digest_of(""):
            raise IdentitiesError(f"{place}.tokens: one is the hash of an empty token")
        yield digest


class Identities:
    """Identities of a file that may change at any time. Thread-safe.

    Args:
        path: Path of the file; None for no tokens and no quotas.

    Attributes:
        version: Number of changes of the identities.

    Raises:
        StartupError: the file can't be read or is invalid.
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
        """True if there is a file, so that calls need credentials."""
        return self._path is not None

    def of_token(self, digest: bytes) -> Identity | None:
        """Returns the identity that has a token, by the token's hash; None if it is unknown.

        The hash also keeps the time of the lookup from telling anything about the tokens.
        """
        return self._contents.by_token.get(digest)

    def named(self, name: str) -> Identity:
        """Returns the identity of a name; a name that is not in the file has the quotas of `[defaults]`."""
        known = self._contents.by_name.get(name)
        if known is not None:
            return known
        return replace(self._contents.anyone, name=name) if name else Identity("")

    def reload(self) -> None:
        """Reloads the file if it has changed. An invalid file changes nothing and is logged once."""
        with self._lock:
            if self._path is None or (signature := _signature(self._path)) == self._seen:
                return
            self._seen = signature
            try:
                contents = _read(self._path)
            except IdentitiesError as error:
                _log.error("--tokens: %s: %s; the identities stay as they were", self._path, error)
                return
            if contents != self._contents:
                self._contents = contents
                self.version += 1
                _log.info("--tokens: %s: read again, %d identities", self._path, len(contents.by_name))


def _signature(path: Path) -> object:
    """Returns a value that changes when the file is written or replaced; None if there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size, stat.st_dev


def _read(path: Path) -> _Contents:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise IdentitiesError((error.strerror or "can't be read").lower()) from None
    if len(raw) > MAX_FILE_BYTES:
        raise IdentitiesError(f"larger than {MAX_FILE_BYTES} bytes")
    try:
        return parse(raw.decode())
    except UnicodeDecodeError:
        raise IdentitiesError("not UTF-8") from None
