"""Files, folders, globs, URLs and standard input: where sequences are read from."""

import glob
import gzip
import io
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import IO, Any, Final
from urllib.parse import unquote

from unroll_proto.sequences.types import SequenceError, UnreadableError

STDIN: Final = "-"
ARROW_MISSING: Final = "{} needs pyarrow: pip install 'unroll-client[files]'"
_REMOTE_MISSING: Final = "URLs need fsspec: pip install 'unroll-client[remote]'"
_GZIP, _ZSTD = ".gz", ".zst"
_MAGIC: Final = {b"\x1f\x8b": _GZIP, b"\x28\xb5\x2f\xfd": _ZSTD}
# What Hive writes for null.
_NULL = "__HIVE_DEFAULT_PARTITION__"
_HEAD = 1 << 16


@dataclass(frozen=True, slots=True)
class Source:
    """One file of sequences.

    Attributes:
        name: Path or URL, for messages; "-" for standard input.
        prefix: Beginning of the ids of sequences without an own one: empty for a single file.
        partitions: Values of Hive partitions, from folders named KEY=VALUE, by key.
        filesystem: fsspec's file system of a URL; None for local files.
    """

    name: str
    prefix: str = ""
    partitions: Mapping[str, str | None] = field(default_factory=dict)
    filesystem: Any = None

    @property
    def codec(self) -> str:
        """Suffix of the compression, ".gz" or ".zst"; empty without one."""
        suffix = PurePosixPath(self.name).suffix.lower()
        return suffix if suffix in (_GZIP, _ZSTD) else ""

    @property
    def kind(self) -> str:
        """Suffix that names the format, in lower case; empty without one."""
        name = self.name[: -len(self.codec)] if self.codec else self.name
        return PurePosixPath(name.split("?")[0] if self.filesystem else name).suffix.lower()

    @property
    def stamp(self) -> str:
        """Size and time of the last change, to notice that a file is another one; empty for standard input."""
        if self.name == STDIN:
            return ""
        with readable(self):
            if self.filesystem is None:
                status = Path(self.name).stat()
                return f"{status.st_size} {status.st_mtime_ns}"
            info = self.filesystem.info(self.name)
            return f"{info.get('size')} {info.get('ETag') or info.get('etag') or info.get('mtime') or ''}"

    def open(self) -> IO[bytes]:
        """Opens the file as it is stored."""
        if self.name == STDIN:
            return os.fdopen(os.dup(sys.stdin.fileno()), "rb")
        if self.filesystem is None:
            return Path(self.name).open("rb")
        opened: IO[bytes] = self.filesystem.open(self.name, "rb")
        return opened


@contextmanager
def readable(source: Source) -> Iterator[None]:
    """Turns errors of the operating system, or of a remote file system, into UnreadableError."""
    try:
        yield
    except (SequenceError, MemoryError):
        raise
    except OSError as error:
        raise UnreadableError(source.name, reason(error)) from None
    except Exception as error:
        # Drivers of remote file systems raise whatever their libraries do.
        if source.filesystem is None:
            raise
        raise UnreadableError(source.name, str(error) or type(error).__name__) from error


def reason(error: OSError) -> str:
    """Returns an error of the operating system in words."""
    return os.strerror(error.errno).lower() if error.errno else str(error)


def find_sources(words: Iterable[str | Path]) -> list[Source]:
    """Finds the files that a command line names.

    Args:
        words: Files; folders, whose files are taken in the order of their names, except those whose name begins with
            "_" or "." (as Spark's `_SUCCESS`); globs, with `**`; URLs of all of these; "-" for standard input.

    Raises:
        UnreadableError: a word names no file.
    """
    given = [str(word) for word in words]
    several = len(given) > 1
    return [source for word in given for source in _expand(word, several)]


def _expand(word: str, several: bool) -> Iterator[Source]:
    if word == STDIN:
        yield Source(STDIN, "-:" if several else "")
    elif "://" in word:
        yield from _remote(word, several)
    elif Path(word).is_dir():
        yield from _folder(word, several)
    elif Path(word).exists() or not glob.has_magic(word):
        yield Source(word, f"{word}:" if several else "")
    else:
        found = sorted(glob.glob(word, recursive=True, include_hidden=False))  # noqa: PTH207 (pathlib takes no absolute patterns)
        if not found:
            raise UnreadableError(word, "no file has such a name")
        for path in found:
            if not _is_hidden(Path(path).name):
                yield from _folder(path, True) if Path(path).is_dir() else [Source(path, f"{path}:", _partitions(path))]


def _folder(folder: str, several: bool) -> Iterator[Source]:
    empty = True
    for path in sorted(Path(folder).rglob("*")):
        inner = path.relative_to(folder)
        if path.is_file() and not any(map(_is_hidden, inner.parts)):
            empty = False
            yield Source(str(path), f"{path if several else inner.as_posix()}:", _partitions(str(path)))
    if empty:
        raise UnreadableError(folder, "a folder without files")


def filesystem_of(url: str, **options: Any) -> tuple[Any, str]:
    """Returns fsspec's file system of a URL, and the path there.

    Args:
        url: The URL.
        options: Arguments of the file system.

    Raises:
        UnreadableError: fsspec, or its driver of such URLs, is not installed.
    """
    try:
        import fsspec
    except ModuleNotFoundError:
        raise UnreadableError(url, _REMOTE_MISSING) from None
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise UnreadableError(url, str(error)) from None
    return filesystem, path


def _remote(url: str, several: bool) -> Iterator[Source]:
    filesystem, path = filesystem_of(url)
    with readable(Source(url, filesystem=filesystem)):
        # Servers of HTTP list nothing, and "?" begins a query there.
        if not url.startswith("http") and glob.has_magic(path):
            found, base = sorted(filesystem.glob(path)), ""
        elif not url.startswith("http") and filesystem.isdir(path):
            found, base = sorted(filesystem.find(path)), "" if several else path.rstrip("/") + "/"
        else:
            yield Source(url, f"{url}:" if several else "", _partitions(url), filesystem)
            return
        count = 0
        for each in found:
            inner = each.removeprefix(path.rstrip("/") + "/")
            if not any(map(_is_hidden, inner.split("/"))):
                count += 1
                name = str(filesystem.unstrip_protocol(each))
                yield Source(name, f"{each.removeprefix(base) if base else name}:", _partitions(each), filesystem)
    if not count:
        raise UnreadableError(url, "no files are there")


def _is_hidden(name: str) -> bool:
    return name.startswith(("_", ".")) and "=" not in name


def _partitions(path: str) -> dict[str, str | None]:
    pairs = [part.split("=", 1) for part in PurePosixPath(path).parent.parts if "=" in part]
    return {unquote(key): None if value == _NULL else unquote(value) for key, value in pairs}


class _Rewound(io.RawIOBase):
    """A stream whose first bytes were read already."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


class _Decompressed(io.RawIOBase):
    """The content of a compressed stream; damage is an error of the file."""

    def __init__(self, source: Source, codec: str, stream: IO[bytes]) -> None:
        self._source, self._codec = source, codec
        self._stream: Any
        if codec == _GZIP:
            self._stream = gzip.GzipFile(fileobj=stream)
        else:
            try:
                import pyarrow as pa
            except ModuleNotFoundError:
                raise SequenceError(source.name, ARROW_MISSING.format("Zstandard")) from None
            self._stream = pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (EOFError, OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            what = f"damaged or cut off: {error} ({self._codec.removeprefix('.')})"
            raise SequenceError(self._source.name, what) from None
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def opened(source: Source, seekable: Callable[[bytes], bool]) -> Iterator[tuple[IO[bytes], bytes]]:
    """Opens a file and decompresses it.

    Args:
        source: The file.
        seekable: Tells by the first bytes if the content must be read at random. What can't be, such as standard
            input, is then copied to a temporary file.

    Yields:
        The content, and its first bytes, which were not taken from it: 64 KiB, or all.
    """
    with source.open() as raw:
        head = raw.read(_HEAD)
        codec = source.codec or next((_MAGIC[magic] for magic in _MAGIC if head.startswith(magic)), "")
        if codec:
            plain = io.BufferedReader(_Decompressed(source, codec, _again(head, raw)), 1 << 18)
            head = plain.read(_HEAD)
            raw = plain
        if not seekable(head):
            yield _again(head, raw), head
        elif not codec and raw.seekable():
            raw.seek(0)
            yield raw, head
        else:
            with TemporaryFile() as copy:
                shutil.copyfileobj(_again(head, raw), copy, 1 << 20)
                copy.seek(0)
                yield copy, head


def _again(head: bytes, rest: IO[bytes]) -> IO[bytes]:
    return io.BufferedReader(_Rewound(head, rest), 1 << 18)
