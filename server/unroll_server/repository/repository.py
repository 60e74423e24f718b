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

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.bundle import Fingerprint, Found, find_bundles, fingerprint, path_of, verify
from unroll_engine.errors import ModelNotFoundError
from unroll_engine.models.loader import Loader, Model
from unroll_engine.models.spec import ModelKey
from unroll_proto.bundle import BundleError
from unroll_server.errors import ModelRefusedError, StartupError
from unroll_server.repository.catalog import Catalog
from unroll_server.repository.departures import CountSessions, Departures
from unroll_server.repository.index import IndexEntry, VersionState
from unroll_server.repository.watcher import Watcher
from unroll_server.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)

NICENESS = 10
"""Of the thread that loads while others are served (Linux)."""

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


async def _none(_: ModelKey, __: bytes) -> int:
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
        linger: Seconds that a version stays loaded at least when it leaves: processes that have not looked yet may
            still begin sessions on it.

    Attributes:
        sessions: Counts the sessions that go on with a content of a version; it leaves when there are none.
        on_change: Called when what takes new work has changed.
    """

    def __init__(
        self,
        root: Path,
        loader: Loader,
        catalog: Catalog,
        engine: AsyncEngine,
        metrics: Metrics,
        *,
        keep: int | None = None,
        poll: float = 0.0,
        linger: float = 0.0,
    ) -> None:
        self.sessions: CountSessions = _none
        self.on_change: Callable[[], Awaitable[None]] = _unheard
        self._root = root
        self._loader = loader
        self._catalog = catalog
        self._engine = engine
        self._metrics = metrics
        self._keep = keep
        self._departures = Departures(catalog, engine, metrics, linger)
        self._versions: dict[ModelKey, _Version] = {}
        self._loading: set[ModelKey] = set()
        self._unloaded: set[str] = set()
        self._unreadable = ""
        # What was wrong with folders when the repository was looked at last, each of which is logged once.
        self._problems = frozenset[str]()
        self._changed = False
        # What the folder held when it was looked at last.
        self._seen: dict[ModelKey, Fingerprint] = {}
        self._looking: asyncio.Task[None] | None = None
        # One change at a time, in the order in which they were asked for.
        self._lock = asyncio.Lock()
        self._watcher = Watcher(
            poll, lambda: self._refresh(patient=True), self._let_go_in_turn, lambda: bool(catalog.leaving)
        )
        # One thread, so that what libraries keep for each thread is kept once.
        self._thread = ThreadPoolExecutor(1, "models")
        catalog.on_free = self._watcher.wake

    async def open(self) -> None:
        """Loads what is there, and begins to watch it.

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
            problems = "".join(f"; {problem}" for problem in sorted(self._problems))
            raise StartupError(f"--models: {self._root} holds no bundle, that is no folder NAME/VERSION/{problems}")
        async with self._lock:
            await self._settle(found, {key.name for key in found})
        if not self._catalog.models:
            problems = "; ".join(version.refused for version in self._versions.values())
            raise StartupError(f"--models: no bundle under {self._root} can be served: {problems}")
        await self._on_thread(_be_nice)
        self._watcher.start()

    def close(self) -> None:
        """Stops watching. What is being loaded is not served any more."""
        self._watcher.close()
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
        # One whose content was replaced takes new work, whatever is left of the old.
        leaving = {model.spec.key for model in self._catalog.leaving} - ready
        entries += [IndexEntry(*key, VersionState.LEAVING, "") for key in leaving]
        return sorted(entries)

    async def refresh(self) -> None:
        """Looks at the folder: loads what is new or has changed, lets go what is gone."""
        await self._refresh(patient=False)

    async def look_for(self, key: ModelKey) -> None:
        """Looks at the folder where the files of a version are not those of the last look.

        Of several processes that each look for themselves, another one may have been faster.
        """
        there, *files = await self._on_thread(fingerprint, self._root, key)
        if there is None or (there, *files) == self._seen.get(key):
            return
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._refresh(patient=True))
        # Whoever asked first may be gone before the others have their answer.
        await asyncio.shield(self._looking)

    async def _refresh(self, patient: bool) -> None:
        """See refresh.

        Args:
            patient: Serves a version on that is gone for the first time: it may be about to be replaced.
        """
        async with self._lock:
            try:
                looked = await self._look()
            except OSError as error:
                # A folder that can't be read says nothing of what it holds.
                if self._unreadable != str(error):
                    _log.error("%s can't be read, what is loaded is served on: %s", self._root, error.strerror)
                self._unreadable = str(error)
                return
            self._unreadable = ""
            found, seen = looked.bundles, dict(looked.bundles)
            known = {key.name for key in self._versions}
            for key, version in self._versions.items():
                if key.name in looked.unreadable:
                    found[key] = version.seen
                    continue
                gone = key not in found and version.model is not None
                if patient and gone and not version.missed:
                    found[key] = version.seen
                version.missed = gone
            await self._settle(found, known.union(key.name for key in found) - self._unloaded)
            self._seen = seen
            await self._let_go()

    async def load(self, name: str) -> None:
        """Loads a model's versions from the folder, those that were refused or unloaded once more.

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

    async def _look(self) -> Found:
        """What the folder holds; raises OSError where it can't be listed."""
        found = await self._on_thread(find_bundles, self._root)
        problems = found.passed_over.union(found.unreadable.values())
        for problem in sorted(problems - self._problems):
            _log.error("passed over: %s", problem)
        self._problems = problems
        return found

    async def _let_go_in_turn(self) -> None:
        async with self._lock:
            await self._let_go()

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
        return current if current and current.spec.bundle == bundle.spec.bundle else self._loader.load(bundle, others)

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
        self._watcher.wake()
        _log.info("%s takes no new work", model.spec.key)

    async def _let_go(self) -> None:
        """Unloads the versions that leave and that nobody needs any more; the caller has the lock."""
        await self._departures.let_go(self.sessions, self._versions)

    async def _on_thread(self, call: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)


def _be_nice() -> None:
    """Lets the threads that serve go before this one, where the system knows priorities of threads."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
