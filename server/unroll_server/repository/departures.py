"""Versions that leave are unloaded when nobody needs them any more."""

import logging
import time
from collections.abc import Awaitable, Callable, Container

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.errors import RequestError
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import ModelKey
from unroll_server.repository.catalog import Catalog
from unroll_server.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)

CountSessions = Callable[[ModelKey, bytes], Awaitable[int]]
"""Counts the sessions that stay on a content of a version; see sessions.store.Store.count."""


class Departures:
    """Unloads what leaves. Used on one event loop.

    Args:
        catalog: Tells who leaves and who is held.
        engine: What runs them.
        metrics: Forgets the versions that are gone.
        linger: Seconds that a version stays loaded at least when it leaves.
    """

    def __init__(self, catalog: Catalog, engine: AsyncEngine, metrics: Metrics, linger: float) -> None:
        self._catalog = catalog
        self._engine = engine
        self._metrics = metrics
        self._linger = linger
        self._since: dict[Model, float] = {}

    async def let_go(self, count: CountSessions, known: Container[ModelKey]) -> None:
        """Unloads the versions that leave and that nobody needs any more.

        Args:
            count: Counts the sessions that go on with one.
            known: Versions of which another content is served, or was refused.
        """
        catalog = self._catalog
        for model in list(catalog.leaving):
            key, freed, now = model.spec.key, catalog.freed, time.monotonic()
            if now < self._since.setdefault(model, now) + self._linger:
                continue
            if catalog.holders(model) or await _has_sessions(model, count):
                continue
            # Somebody may have come while the sessions were counted; or gone, and left a session that was not.
            if not catalog.holders(model) and freed == catalog.freed:
                catalog.forget(model)
                del self._since[model]
                self._engine.remove_model(model)
                if key not in known:
                    self._metrics.model_removed(str(key))
                _log.info("%s unloaded", key)


async def _has_sessions(model: Model, count: CountSessions) -> bool:
    try:
        return await count(model.spec.key, model.spec.bundle) > 0
    except RequestError as error:
        _log.warning("%s stays loaded: its sessions can't be counted: %s", model.spec.key, error)
        return True
