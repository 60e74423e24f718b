"""The model repository while serving: new versions take new work, others leave when nobody needs them any more."""

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from unroll_proto.bundle import BundleError
from unroll_server.bundle import Fingerprint, find_bundles, fingerprint, path_of, verify
from unroll_server.catalog import Catalog
from unroll_server.engine import Engine
from unroll_server.errors import ModelNotFoundError, ModelRefusedError, RequestError, StartupError
from unroll_server.index import IndexEntry, VersionState
from unroll_server.metrics import Metrics
from unroll_server.models import Loader, Model
from unroll_server.types import ModelKey

_log = logging.getLogger(__name__)

NICENESS = 10
"""Of the thread that loads while others are served (Linux)."""
LOOK_AGAIN = 5.0
"""Seconds between looks for the sessions of versions that leave, where the repository is not polled."""

_T = TypeVar("_T")


@dataclass(slots=True)
class _Version:
    """What was made of the files of a version.

    Attributes:
        seen: The files.
        model: What is served of it: of these files, or of those before them where these are refused.
        refused: Why these files are refused; empty where they are not.
        missed: Whether there were no files when the watcher looked last.
    """

    seen: Fingerprint
    model: Model | None
    refused: str
    missed: bool = False


async def _none(_: ModelKey) -> int:
    return 0


async def _unheard() -> None:
    return


class Repository:
    """Keeps what is served in step with a folder of bundles. Made and used on one event loop; loads on a thread.

    Args:
        root: Folder of `NAME/VERSION/` bundles.
        loader: Makes bundles ready to run.
        catalog: Told of what takes new work.
        engine: Told of what can be run.
        metrics: Counts what is loaded and refused.
        keep: How many versions of a model to serve, the newest good ones; None for all.
        poll: Seconds between looks at the folder; 0 for none.

    Attributes:
        sessions: Counts the sessions that go on with a version; it leaves when there are none.
        on_change: Called when what takes new work has changed.
    """

    def __init__(
        self,
        root: Path,
        loader: Loader,
        catalog: Catalog,
        engine: Engine,
        metrics: Metrics,
        *,
        keep: int | None = None,
        poll: float = 0.0,
    ) -> None:
        self.sessions: Callable[[ModelKey], Awaitable[int]] = _none
        self.on_change: Callable[[], Awaitable[None]] = _unheard
        self._root = root
        self._loader = loader
        self._catalog = catalog
        self._engine = engine
        self._metrics = metrics
        self._keep = keep
        self._poll = poll
        self._versions: dict[ModelKey, _Version] = {}
        self._loading: set[ModelKey] = set()
        self._unloaded: set[str] = set()
        self._unreadable = ""
        self._changed = False
        # One change at a time, in the order in which they were asked for.
        self._lock = asyncio.Lock()
        self._freed = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        # One thread, so that what libraries keep for each thread is kept once.
        self._thread = ThreadPoolExecutor(1, "models")
        catalog.on_free = self._freed.set

    async def open(self) -> None:
        """Loads what is there, and begins to watch it.

        Raises:
            StartupError: there is no such folder, or nothing in it can be served.
        """
        if not self._root.is_dir():
            raise StartupError(f"--models: {self._root} is not a folder")
        try:
            found = await self._on_thread(find_bundles, self._root)
        except OSError as error:
            raise StartupError(f"--models: {self._root}: {error.strerror}") from None
        if not found:
            raise StartupError(f"--models: {self._root} holds no bundle, that is no folder NAME/VERSION/")
        async with self._lock:
            await self._settle(found, {key.name for key in found})
        if not self._catalog.models:
            problems = "; ".join(version.refused for version in self._versions.values())
            raise StartupError(f"--models: no bundle under {self._root} can be served: {problems}")
        await self._on_thread(_be_nice)
        self._watcher = asyncio.create_task(self._watch())

    def close(self) -> None:
        """Stops watching. What is being loaded is not served any more."""
        if self._watcher:
            self._watcher.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def index(self) -> list[IndexEntry]:
        """Every version that is served, leaves, is being loaded or was refused, by name and version."""
        ready = {model.spec.key for model in self._catalog.models}
        entries = [
            IndexEntry(*key, VersionState.READY if key in ready else VersionState.REFUSED, version.refused)
            for key, version in self._versions.items()
            if key in ready or (version.refused and key not in self._loading)
        ]
        entries += [IndexEntry(*key, VersionState.LOADING, "") for key in self._loading - ready]
        entries += [IndexEntry(*model.spec.key, VersionState.LEAVING, "") for model in self._catalog.leaving]
        return sorted(entries)

    async def refresh(self) -> None:
        """Looks at the folder: loads what is new or has changed, lets go what is gone."""
        await self._refresh(patient=False)

    async def _refresh(self, patient: bool) -> None:
        """See refresh.

        Args:
            patient: Serves a version on that is gone for the first time: it may be about to be replaced.
        """
        async with self._lock:
            try:
                found = await self._on_thread(find_bundles, self._root)
            except OSError as error:
                # A folder that can't be read says nothing of what it holds.
                if self._unreadable != str(error):
                    _log.error("%s can't be read, what is loaded is served on: %s", self._root, error.strerror)
                self._unreadable = str(error)
                return
            self._unreadable = ""
            known = {key.name for key in self._versions}
            for key, version in self._versions.items():
                gone = key not in found and version.model is not None
                if patient and gone and not version.missed:
                    found[key] = version.seen
                version.missed = gone
            await self._settle(found, known.union(key.name for key in found) - self._unloaded)
            await self._let_go()

    async def load(self, name: str) -> None:
        """Loads a model's versions from the folder, those that were refused or unloaded once more.

        Raises:
            ModelNotFoundError: the folder holds no version of it.
            ModelRefusedError: none can be served.
        """
        async with self._lock:
            try:
                found = await self._on_thread(find_bundles, self._root)
            except OSError as error:
                raise ModelRefusedError(f"the repository can't be read: {error.strerror}") from None
            found = {key: seen for key, seen in found.items() if key.name == name}
            if not found:
                raise ModelNotFoundError(f"no model {name!r} in the repository", "model")
            self._unloaded.discard(name)
            for key, version in list(self._versions.items()):
                if key.name == name and version.refused:
                    version.seen = ()
            await self._settle(found, {name})
            await self._let_go()
            if not any(model.spec.key.name == name for model in self._catalog.models):
                reasons = [version.refused for key, version in self._versions.items() if key.name == name]
                raise ModelRefusedError("; ".join(reasons))

    async def unload(self, name: str) -> None:
        """Takes every version of a model out of service, until it is loaded again by name.

        Raises:
            ModelNotFoundError: no version of it is served.
        """
        async with self._lock:
            if not any(model.spec.key.name == name for model in self._catalog.models):
                raise ModelNotFoundError(f"no model {name!r} is served", "model")
            self._unloaded.add(name)
            await self._settle({}, {name})
            await self._let_go()

    async def _watch(self) -> None:
        """Looks at the folder now and then, and lets go of versions when they are free."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self._poll
        while True:
            pause = max(0.0, due - loop.time()) if self._poll else LOOK_AGAIN if self._catalog.leaving else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._freed.wait()
            self._freed.clear()
            try:
                if self._poll and loop.time() >= due:
                    await self._refresh(patient=True)
                    due = loop.time() + self._poll
                else:
                    async with self._lock:
                        await self._let_go()
            except Exception:
                _log.exception("the repository could not be brought up to date")
                due = loop.time() + self._poll

    async def _settle(self, found: dict[ModelKey, Fingerprint], names: Iterable[str]) -> None:
        """Brings what is served of the models `names` in step with what was found of them."""
        for name in sorted(names):
            serve: set[ModelKey] = set()
            for key in sorted((key for key in found if key.name == name), reverse=True):
                if len(serve) == self._keep:
                    break
                if await self._can_serve(key, found[key]):
                    serve.add(key)
            # A version whose files are refused is remembered, so that it is refused once.
            for key, version in list(self._versions.items()):
                if key.name == name and key not in serve and (version.model or key not in found):
                    if version.model:
                        self._retire(version.model)
                    del self._versions[key]
        if self._changed:
            self._changed = False
            await self.on_change()

    async def _can_serve(self, key: ModelKey, seen: Fingerprint) -> bool:
        """Loads a version where its files are not those that were looked at last; whether it is served then."""
        known = self._versions.get(key)
        if known and known.seen == seen:
            return known.model is not None
        current = known.model if known else None
        self._loading.add(key)
        try:
            model = await self._on_thread(self._load, key, current, [*self._catalog.models])
        except BundleError as error:
            # Files that change while they are read are still being written: they are looked at once more.
            if await self._on_thread(fingerprint, self._root, key) == seen:
                self._refuse(key, seen, current, str(error))
            return current is not None
        finally:
            self._loading.discard(key)
        self._versions[key] = _Version(seen, model, "")
        if model is not current:
            self._engine.add_model(model)
            self._catalog.add(model)
            self._changed = True
            self._metrics.model_loaded(str(key))
            _log.info("%s %s", key, "replaced" if current else "loaded")
        return True

    def _load(self, key: ModelKey, current: Model | None, others: list[Model]) -> Model:
        """Verifies and loads a version, on the thread; `current` where that has the same content."""
        bundle = verify(self._root, key)
        return current if current and current.digest == bundle.digest else self._loader.load(bundle, others)

    def _refuse(self, key: ModelKey, seen: Fingerprint, current: Model | None, reason: str) -> None:
        known = self._versions.get(key)
        self._versions[key] = _Version(seen, current, reason)
        if known is None or known.refused != reason:
            served = ", what was loaded before is served on" if current else ""
            _log.error("refused %s%s: %s", path_of(self._root, key), served, reason)
            self._metrics.model_refused(str(key))

    def _retire(self, model: Model) -> None:
        self._catalog.retire(model)
        self._changed = True
        _log.info("%s takes no new work", model.spec.key)

    async def _let_go(self) -> None:
        """Unloads the versions that leave and that nobody needs any more."""
        for model in list(self._catalog.leaving):
            key = model.spec.key
            if self._catalog.holders(model) or await self._has_sessions(model):
                continue
            # Somebody may have come while the sessions were counted.
            if not self._catalog.holders(model):
                self._catalog.forget(model)
                self._engine.remove_model(model)
                if key not in self._versions:
                    self._metrics.model_removed(str(key))
                _log.info("%s unloaded", key)

    async def _has_sessions(self, model: Model) -> bool:
        try:
            return await self.sessions(model.spec.key) > 0
        except RequestError as error:
            _log.warning("%s stays loaded: its sessions can't be counted: %s", model.spec.key, error)
            return True

    async def _on_thread(self, call: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)


def _be_nice() -> None:
    """Lets the threads that serve go before this one, where the system knows priorities of threads."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
