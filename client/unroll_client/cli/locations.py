"""Where outputs go: paths, and URLs that offer what outputs need of paths."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile
from typing import IO, Any

from unroll_proto import files
from unroll_proto.cli import InputError
from unroll_proto.sequences import SequenceError
from unroll_proto.sequences.files import filesystem_of


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A file or folder at a URL, with some methods of `pathlib.Path`; their errors are OSErrors.

    Folders are not made or removed: object stores have none.

    Attributes:
        url: The URL, without a slash at the end.
        filesystem: fsspec's file system.
        path: The path there.
    """

    url: str
    filesystem: Any
    path: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}", self.filesystem, f"{self.path}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self.path).name

    @property
    def suffix(self) -> str:
        """Suffix of the name."""
        return PurePosixPath(self.path).suffix

    @property
    def parent(self) -> "RemotePath":
        """The folder of it."""
        return RemotePath(self.url.rpartition("/")[0], self.filesystem, self.path.rpartition("/")[0])

    def is_dir(self) -> bool:
        """True if there are files below it."""
        with _os_errors():
            return bool(self.filesystem.isdir(self.path))

    def iterdir(self) -> "Iterator[RemotePath]":
        """Yields the files in it."""
        with _os_errors():
            try:
                found = self.filesystem.ls(self.path, detail=False)
            except FileNotFoundError:
                found = []
        for path in found:
            # A store's marker of a folder is listed in it.
            if path.rstrip("/") != self.path:
                yield self / PurePosixPath(path).name

    def read_bytes(self) -> bytes:
        """Reads the file."""
        with _os_errors():
            return bytes(self.filesystem.cat_file(self.path))

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the file."""
        with _os_errors(), suppress(FileNotFoundError):
            self.filesystem.rm_file(self.path)

    @contextmanager
    def replacing(self) -> Iterator[IO[bytes]]:
        """Yields a local file that is uploaded as this one at the end, but not after an exception."""
        with NamedTemporaryFile() as file:
            yield file
            file.flush()
            with _os_errors():
                self.filesystem.put_file(file.name, self.path)


Location = Path | RemotePath


def location(word: str) -> Location:
    """Returns the path or the URL.

    Raises:
        InputError: nothing can be written to such URLs.
    """
    if "://" not in word:
        return Path(word)
    if word.startswith("http"):
        raise InputError(f"{word}: can't be written; URLs such as s3://, gs:// and az:// can")
    try:
        # Other processes may write there, too.
        filesystem, path = filesystem_of(word, use_listings_cache=False)
    except SequenceError as error:
        raise InputError(str(error)) from None
    return RemotePath(word.rstrip("/"), filesystem, path.rstrip("/"))


def replacing(path: Location) -> AbstractContextManager[IO[bytes]]:
    """Yields a file to write to, which becomes `path` at the end as a whole, but not after an exception."""
    return files.replacing(path) if isinstance(path, Path) else path.replacing()


@contextmanager
def _os_errors() -> Iterator[None]:
    """Turns whatever the libraries of file systems raise into OSErrors."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(" ".join(str(error).split()) or type(error).__name__) from error
