"""The loaded versions, found by name, version and content."""

import asyncio
from collections.abc import Iterable

from unroll_engine.errors import InvalidRequestError, ModelNotFoundError
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import ModelKey
from unroll_server.repository.version import LoadedVersion
from unroll_server.telemetry.metrics import Metrics


class Catalog:
    """Finds the loaded version for a request. Used on one event loop.

    Args:
        models: The models served at first.
        metrics: Counts the open sequences.

    Attributes:
        models: Models that accept new work, by name and version.
        draining: Versions that refuse new work, in the order of their retirement.
        idle: Set when a draining version has no references left, so that it may be unloaded.
    """

    def __init__(self, models: Iterable[Model] = (), metrics: Metrics | None = None) -> None:
        self._metrics = metrics or Metrics()
        self._ready: dict[ModelKey, LoadedVersion] = {}
        self._newest: dict[str, LoadedVersion] = {}
        self.models: list[Model] = []
        self.draining: list[LoadedVersion] = []
        self.idle = asyncio.Event()
        for model in models:
            self.add(model)

    def find(self, name: str, version: int, field: str = "model", resumes: bytes | None = None) -> LoadedVersion:
        """Finds a version that accepts new work; for work that resumes, also a draining version.

        Args:
            name: Name of the model; empty for the only one served.
            version: Number of the version; 0 for the newest.
            field: Field of the request that holds the name.
            resumes: Bundle of the snapshot or session that the work resumes, empty if unknown; None for new work.
                Versions with that bundle come first.

        Raises:
            ModelNotFoundError: the model or the version is not served.
            InvalidRequestError: no name is given and several models are served.
        """
        if not name:
            if len(self._newest) > 1:
                raise InvalidRequestError(f"required when several are served ({', '.join(self._newest)})", field)
            if not self._newest:
                raise ModelNotFoundError("no model is served", field)
            name = next(iter(self._newest))
        found = self._ready.get(ModelKey(name, version))
        if version and resumes is not None and (found is None or resumes != found.bundle):
            latest_first = [draining for draining in reversed(self.draining) if draining.key == (name, version)]
            same_content = (draining for draining in latest_first if draining.bundle == resumes)
            found = next(same_content, found or next(iter(latest_first), None))
        if found is None and not version:
            found = self._newest.get(name)
        if found is not None:
            return found
        if name not in self._newest:
            choice = f"choose from: {', '.join(self._newest)}" if self._newest else "no model is"
            raise ModelNotFoundError(f"{name!r} is not served; {choice}", field)
        versions = ", ".join(str(model.spec.key.version) for model in self.models if model.spec.key.name == name)
        problem = f"{name}/{version} is not served; choose from: {versions}"
        raise ModelNotFoundError(problem, field.removesuffix("model") + "version")

    def add(self, model: Model) -> LoadedVersion:
        """Routes new work to a model; the version that had its name and number begins to drain."""
        key = model.spec.key
        replaced = self._ready.get(key)
        added = self._ready[key] = LoadedVersion(model, self._metrics, self.idle.set)
        self._index()
        if replaced:
            self._drain(replaced)
        return added

    def retire(self, version: LoadedVersion) -> None:
        """Routes new work away from a version, which begins to drain."""
        del self._ready[version.key]
        self._index()
        self._drain(version)

    def remove(self, version: LoadedVersion) -> None:
        """Removes a draining version, which is unloaded."""
        self.draining.remove(version)
        version.unload()

    def _drain(self, version: LoadedVersion) -> None:
        self.draining.append(version)
        version.drain()

    def _index(self) -> None:
        self.models = sorted((version.model for version in self._ready.values()), key=lambda model: model.spec.key)
        self._newest = {model.spec.key.name: self._ready[model.spec.key] for model in self.models}
