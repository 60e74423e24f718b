"""A local copy of a model repository elsewhere: S3, Google Cloud Storage, Azure, HTTP, whatever fsspec reads."""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unroll_engine.models.spec import ModelKey
from unroll_proto import bundle
from unroll_server.errors import StartupError

SEPARATOR = "://"
"""What tells a URL from a folder."""


class Mirror:
    """Copies the bundles under a URL to a folder, each whole or not at all.

    A version is there once its `manifest.json` is, so writers upload that last. A version whose files don't match its
    manifest is still being written, or broken: it is not copied until one of its files changes, and a copy made before
    stays. Processes with the same folder take turns.

    Args:
        url: URL of a folder of NAME/VERSION/ bundles; credentials come from where the file system looks for them.
        cache: Folder for copies, which outlive the process; None for one in the user's cache.

    Attributes:
        root: Folder of the copied `NAME/VERSION/` bundles.

    Raises:
        StartupError: the URL can't be read by what is installed, or the folder can't be written.
    """

    def __init__(self, url: str, cache: Path | None) -> None:
        try:
            import fsspec
        except ModuleNotFoundError:
            raise StartupError("--models: fsspec is not installed; install unroll-server[remote]") from None
        self._url = url
        try:
            self._files, self._path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StartupError(f"--models: {url}: {error}") from None
        base = cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "unroll"
        self._folder = base / hashlib.sha256(url.encode()).hexdigest()[:16]
        self.root = self._folder / "models"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartupError(f"--models-cache: {self.root}: {error.strerror}") from None

    def update(self) -> set[str]:
        """Copies new and changed versions, and removes the copies of those that are gone.

        Returns:
            What could not be read or copied, each with the reason; the copies made before stay.
        """
        with self._locked():
            try:
                there = self._versions()
            except Exception as error:  # each file system raises its own
                return {f"{self._url} can't be read, copied models are still served: {_reason(error)}"}
            known = self._known()
            problems = set[str]()
            for key, state in there.items():
                before = known.get(str(key), {})
                if before.get("state") != state:
                    problem = self._copy(key)
                    copied = before.get("copied", False) or not problem
                    known[str(key)] = before = {"state": state, "problem": problem, "copied": copied}
                if before["problem"]:
                    problems.add(before["problem"])
            for name in known.keys() - set(map(str, there)):
                self._remove(self.root / name)
                del known[name]
            self._remember(known)
        return problems

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _versions(self) -> dict[ModelKey, str]:
        """Lists the versions that have a manifest, each with a digest of what is known of its files."""
        self._files.invalidate_cache()
        versions: dict[ModelKey, list[str]] = {}
        complete = set[ModelKey]()
        for path, info in sorted(self._files.find(self._path, detail=True).items()):
            name, _, rest = path.removeprefix(self._path).strip("/").partition("/")
            version, _, file = rest.partition("/")
            if not (version.isascii() and version.isdigit() and not version.startswith("0")) or name.startswith("."):
                continue
            key = ModelKey(name, int(version))
            versions.setdefault(key, []).append(repr(sorted((field, str(value)) for field, value in info.items())))
            if file == bundle.MANIFEST:
                complete.add(key)
        return {key: hashlib.sha256("\n".join(versions[key]).encode()).hexdigest() for key in complete}

    def _copy(self, key: ModelKey) -> str:
        """Copies a version; returns the reason if that is not possible."""
        source = f"{self._path.rstrip('/')}/{key}"
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            draft = Path(folder, "draft")
            draft.mkdir()
            try:
                bundle.check_name(key.name)
                self._get(f"{source}/{bundle.MANIFEST}", draft / bundle.MANIFEST, bundle.MAX_MANIFEST_BYTES)
                # The manifest has only names and sizes that a bundle may have.
                for artifact in bundle.read_manifest(draft).artifacts:
                    self._get(f"{source}/{artifact.file}", draft / artifact.file, artifact.size_bytes)
                    bundle.check_artifact(draft, artifact)
            except Exception as error:  # as above
                return f"{self._url}: {key} is not copied: {_reason(error)}"
            target = self.root / str(key)
            target.parent.mkdir(exist_ok=True)
            self._remove(target)
            draft.rename(target)
        return ""

    def _get(self, source: str, target: Path, limit: int) -> None:
        size = self._files.size(source)
        if size is not None and size > limit:
            raise bundle.BundleError(f"{source}: {size} bytes, {limit} at most")
        self._files.get_file(source, str(target))

    def _remove(self, path: Path) -> None:
        """Removes a copy at once, as a reader sees it."""
        if path.exists():
            with tempfile.TemporaryDirectory(dir=self._folder) as folder:
                path.rename(Path(folder, "removed"))

    def _known(self) -> dict[str, Any]:
        """Returns what is known of the versions; nothing of those whose copy was removed."""
        try:
            known: dict[str, Any] = json.loads((self._folder / "known.json").read_text())
        except (OSError, ValueError):
            return {}
        return {name: each for name, each in known.items() if not each["copied"] or (self.root / name).is_dir()}

    def _remember(self, known: dict[str, Any]) -> None:
        draft = self._folder / "known.draft"
        draft.write_text(json.dumps(known))
        draft.rename(self._folder / "known.json")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
