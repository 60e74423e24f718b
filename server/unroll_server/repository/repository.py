"""The model repository: loads the versions in its folder, retires those that were removed."""

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Iterable, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.bundle import Fingerprint, Found, find_bundles, fingerprint, path_of, verify
from unroll_engine.errors import ModelNotFoundError, RequestError
from unroll_engine.models.loader import Loader, Model
from unroll_engine.models.spec import ModelKey
from unroll_proto.bundle import BundleError
from unroll_server.errors import ModelRefusedError, StartupError
from unroll_server.repository.catalog import Catalog
from unroll_server.repository.mirror import Mirror
from unroll_server.repository.version import IndexEntry, LoadedVersion, VersionFiles, VersionState
from unroll_server.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)

NICENESS = 10
"""Niceness of the thread that loads while others serve (Linux)."""
COUNT_TIMEOUT = 10.0
"""Most seconds for a count of the sessions on a version."""

_T = TypeVar("_T")

CountSessions = Callable[[ModelKey, bytes], Awaitable[int]]
"""Counts the sessions on a content of a version; see sessions.store.Store.count."""


class Repository:
    """Serves the bundles of a folder. Created and used on one event loop; loads on a separate thread.

    Args:
        root: Folder of `NAME/VERSION/` bundles, or a copy of one elsewhere.
        loader: Loads bundles.
        catalog: Receives the loaded versions.
        engine: Runs them.
        metrics: Counts versions found, loaded and refused.
        count_sessions: Counts the sessions on a version, which stays loaded as long as there are any.
        on_change: Called when the versions that accept new work have changed.
        keep: Number of versions of a model to serve, the newest good ones; None for all.
        drain_at_least: Least seconds that a version drains: until then other processes with the same folder and
            sessions can start sessions on it.
    """

    def __init__(
        self,
        root: Path | Mirror,
        loader: Loader,
        catalog: Catalog,
        engine: AsyncEngine,
        metrics: Metrics,
        *,
        count_sessions: CountSessions,
        on_change: Callable[[], Awaitable[None]],
        keep: int | None = None,
        drain_at_least: float = 0.0,
    ) -> None:
        self._mirror = root if isinstance(root, Mirror) else None
        self._root = root.root if isinstance(root, Mirror) else root
        self._loader = loader
        self._catalog = catalog
        self._engine = engine
        self._metrics = metrics
        self._count_sessions = count_sessions
        self._on_change = on_change
        self._keep = keep
        self._drain_at_least = drain_at_least
        self._files: dict[ModelKey, VersionFiles] = {}
        self._loading: ModelKey | None = None
        self._unloaded: set[str] = set()
        self._announced: list[Model] = []
        self._problems: Set[str] = frozenset()
        self._seen: dict[ModelKey, Fingerprint] = {}
        self._looking: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()  # one change at a time, in order
        self._thread = ThreadPoolExecutor(1, "models")  # one, since libraries keep memory per thread

    async def open(self) -> None:
        """Loads the bundles of the folder.

        Raises:
            StartupError: there is no such folder, or nothing in it can be served.
        """
        if not self._root.is_dir():
            raise StartupError(f"--models: {self._root} is not a folder")
        try:
            found = (await self._look()).bundles
        except OSError as error:
            raise StartupError(f"--models: {self._root}: {error.strerror}") from None
        if not found:
            problem = f"--models: {self._root} holds no bundle, that is no folder NAME/VERSION/"
            raise StartupError("; ".join([problem, *sorted(self._problems)]))
        await self._apply(found, {key.name for key in found})
        if not self._catalog.models:
            problems = "; ".join(files.refused for files in self._files.values())
            raise StartupError(f"--models: no bundle under {self._root} can be served: {problems}")
        await self._on_thread(_lower_priority)

    def close(self) -> None:
        """Ends the thread. A version that is loading is never served."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def index(self) -> list[IndexEntry]:
        """Returns every version that is served, drains, is being loaded or was refused, by name and number."""
        entries = {version.key: (VersionState.DRAINING, "") for version in self._catalog.draining}
        entries |= {key: (VersionState.REFUSED, files.refused) for key, files in self._files.items() if files.refused}
        if self._loading:
            entries[self._loading] = VersionState.LOADING, ""
        entries |= {key: (VersionState.READY, files.refused) for key, files in self._files.items() if files.loaded}
        return sorted(IndexEntry(*key, *entry) for key, entry in entries.items())

    async def refresh(self, patient: bool = False) -> None:
        """Scans the folder; loads new and changed versions, retires those whose files are gone.

        Args:
            patient: True to keep a version whose files are missing for the first time, as during a replacement.
        """
        async with self._lock:
            try:
                looked = await self._look()
            except OSError as error:
                # Nothing is known about the contents of a folder that can't be read.
                self._report({f"{self._root} can't be read, loaded models are still served: {error.strerror}"})
                return
            found, seen = looked.bundles, dict(looked.bundles)
            for key, files in self._files.items():
                if key.name in looked.unreadable:
                    found[key] = files.seen
                    continue
                gone = key not in found and files.loaded is not None
                if patient and gone and not files.missed:
                    found[key] = files.seen
                files.missed = gone
            await self._apply(found, {key.name for key in (*self._files, *found)} - self._unloaded)
            self._seen = seen

    async def refresh_for(self, key: ModelKey) -> None:
        """Scans the folder if files of a version have changed, which another process may have seen first."""
        there, *files = await self._on_thread(fingerprint, self._root, key)
        if there is None or (there, *files) == self._seen.get(key):
            return
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self.refresh(patient=True))
        # A caller that leaves must not cancel a refresh that others wait for.
        await asyncio.shield(self._looking)

    async def load(self, name: str) -> None:
        """Loads a model's versions from the folder, including those that were refused or unloaded.

        Raises:
            ModelNotFoundError: the folder holds no version of it.
            ModelRefusedError: none can be served.
        """
        async with self._lock:
            try:
                looked = await self._look()
            except OSError as error:
                raise ModelRefusedError(f"the repository can't be read: {error.strerror}") from None
            if name in looked.unreadable:
                raise ModelRefusedError(looked.unreadable[name])
            found = {key: seen for key, seen in looked.bundles.items() if key.name == name}
            if not found:
                raise ModelNotFoundError(f"{name!r} is not in the repository", "model")
            self._unloaded.discard(name)
            for files in self._refused(name):
                files.seen = ()
            await self._apply(found, {name})
            if not self._serves(name):
                raise ModelRefusedError("; ".join(files.refused for files in self._refused(name)))

    async def unload(self, name: str) -> None:
        """Retires every version of a model, until `load` is called with its name.

        Raises:
            ModelNotFoundError: no version of it is served.
        """
        async with self._lock:
            if not self._serves(name):
                raise ModelNotFoundError(f"{name!r} is not served", "model")
            self._unloaded.add(name)
            await self._apply({}, {name})

    async def unload_drained(self) -> None:
        """Unloads the draining versions that no sequence and no session is on."""
        async with self._lock:
            await self._unload_drained()

    def _serves(self, name: str) -> bool:
        return any(model.spec.key.name == name for model in self._catalog.models)

    def _refused(self, name: str) -> list[VersionFiles]:
        return [files for key, files in self._files.items() if key.name == name and files.refused]

    async def _look(self) -> Found:
        """Lists the folder; raises OSError if that fails."""
        problems = await self._on_thread(self._mirror.update) if self._mirror else set()
        found = await self._on_thread(find_bundles, self._root)
        passed_over = found.passed_over.union(found.unreadable.values())
        self._report(problems | {f"passed over: {problem}" for problem in passed_over})
        return found

    def _report(self, problems: Set[str]) -> None:
        """Logs the problems of a scan that the previous scan did not have."""
        for problem in sorted(problems - self._problems):
            _log.error("%s", problem)
        self._problems = problems

    async def _apply(self, found: dict[ModelKey, Fingerprint], names: Iterable[str]) -> None:
        """Loads and retires versions of the models `names` until those found are served."""
        for name in sorted(names):
            serve: set[ModelKey] = set()
            for key in sorted((key for key in found if key.name == name), reverse=True):
                if len(serve) == self._keep:
                    break
                if await self._can_serve(key, found[key]):
                    serve.add(key)
            # Refused files stay known, so that they are refused once.
            for key, files in list(self._files.items()):
                if key.name == name and key not in serve and (files.loaded or key not in found):
                    del self._files[key]
                    self._metrics.of(str(key)).found(-1)
                    if files.loaded:
                        self._catalog.retire(files.loaded)
                        _log.info("%s drains: it accepts no new work", key)
        if self._catalog.models != self._announced:
            self._announced = self._catalog.models
            await self._on_change()
        await self._unload_drained()

    async def _can_serve(self, key: ModelKey, seen: Fingerprint) -> bool:
        """Loads a version if its files have changed; returns True if the version is served then."""
        files = self._files.get(key)
        if files and files.seen == seen:
            return files.loaded is not None
        current = files.loaded if files else None
        self._loading = key
        try:
            model = await self._on_thread(self._load, key, current and current.model, [*self._catalog.models])
        except BundleError as error:
            # Files that change while they are read are still being written; the next scan sees them again.
            if await self._on_thread(fingerprint, self._root, key) == seen:
                self._refuse(key, VersionFiles(seen, current, str(error)))
            return current is not None
        finally:
            self._loading = None
        if current is None or current.model is not model:
            self._engine.add_model(model)
            loaded, current = "replaced" if current else "loaded", self._catalog.add(model)
            self._metrics.of(str(key)).loaded()
            _log.info("%s %s, run by %s", key, loaded, model.runtime_text)
        self._know(key, VersionFiles(seen, current))
        return True

    def _load(self, key: ModelKey, current: Model | None, others: list[Model]) -> Model:
        """Verifies and loads a version, on the thread; returns `current` if that has the same content."""
        bundle = verify(self._root, key)
        return current if current and current.spec.bundle == bundle.spec.bundle else self._loader.load(bundle, others)

    def _know(self, key: ModelKey, files: VersionFiles) -> VersionFiles | None:
        """Records the files of a version; returns those known before, None if it is new."""
        known, self._files[key] = self._files.get(key), files
        if known is None:
            self._metrics.of(str(key)).found(1)
        return known

    def _refuse(self, key: ModelKey, files: VersionFiles) -> None:
        known = self._know(key, files)
        if known is None or known.refused != files.refused:
            served = ", the version loaded before is still served" if files.loaded else ""
            _log.error("refused %s%s: %s", path_of(self._root, key), served, files.refused)
            self._metrics.of(str(key)).refused()

    async def _unload_drained(self) -> None:
        """Like `unload_drained`; the caller holds the lock."""
        for version in list(self._catalog.draining):
            key, acquisitions = version.key, version.acquisitions
            if version.references or version.age < self._drain_at_least or await self._has_sessions(version):
                continue
            # A sequence may have opened meanwhile, or left a session that was not counted.
            if version.acquisitions == acquisitions:
                self._catalog.remove(version)
                self._engine.remove_model(version.model)
                _log.info("%s unloaded", key)

    async def _has_sessions(self, version: LoadedVersion) -> bool:
        try:
            async with asyncio.timeout(COUNT_TIMEOUT):
                return await self._count_sessions(version.key, version.bundle) > 0
        except (RequestError, TimeoutError) as error:
            _log.warning("%s stays loaded: its sessions can't be counted: %s", version.key, str(error) or "timeout")
            return True

    async def _on_thread(self, call: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)


def _lower_priority() -> None:
    """Lowers the priority of the calling thread, if the system has priorities of threads."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
