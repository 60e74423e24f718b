"""An in-process model repository with catalog, engine and watcher."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from support.models import alone
from support.values import random_values
from unroll_engine.async_engine import AsyncEngine
from unroll_engine.jobs import BatchJob
from unroll_engine.models.loader import Loader, Model
from unroll_engine.models.spec import ModelKey
from unroll_server.repository.catalog import Catalog
from unroll_server.repository.repository import CountSessions, Repository
from unroll_server.repository.watcher import Watcher
from unroll_server.telemetry.metrics import Metrics

LANES = 4


class ServedRepository:
    """A repository with its catalog, engine and watcher.

    Args:
        root: Folder of the bundles.
        keep: See Repository.
        poll: See Watcher.
        drain_at_least: See Repository.

    Attributes:
        count_sessions: Counts the sessions on a version; none unless a test replaces it.
        changes: Versions that accepted new work after each change.
        changed: Set after each change.
    """

    def __init__(self, root: Path, keep: int | None, poll: float, drain_at_least: float) -> None:
        self._metrics = Metrics()
        self.engine = AsyncEngine((), max_lanes=LANES, tick_steps=5, max_queued_steps=10**6, metrics=self._metrics)
        self.catalog = Catalog()
        self.count_sessions: CountSessions = _no_sessions
        self.repository = Repository(
            root,
            Loader("onnx", "cpu", LANES),
            self.catalog,
            self.engine,
            self._metrics,
            count_sessions=lambda key, bundle: self.count_sessions(key, bundle),
            on_change=self._on_change,
            keep=keep,
            drain_at_least=drain_at_least,
        )
        self.watcher = Watcher(self.repository, self.catalog, poll)
        self.changes: list[list[str]] = []
        self.changed = asyncio.Event()

    async def _on_change(self) -> None:
        self.changes.append(self.names)
        self.changed.set()

    @property
    def names(self) -> list[str]:
        """Versions that accept new work, NAME/VERSION."""
        return [str(model.spec.key) for model in self.catalog.models]

    @property
    def index(self) -> list[tuple[str, int, str]]:
        """The repository's index without the reasons."""
        return [(name, version, str(state)) for name, version, state, _ in self.repository.index()]

    def loads(self, outcome: str) -> dict[str, float]:
        """Counts of `unroll_model_loads_total` by NAME/VERSION."""
        (family,) = (each for each in self._metrics.collect() if each.name == "unroll_model_loads")
        samples = (each for each in family.samples if each.labels["outcome"] == outcome)
        return {f"{each.labels['model']}/{each.labels['version']}": each.value for each in samples}

    async def classify(self, model: Model) -> None:
        """Runs a sequence on a model and checks its bits."""
        values = random_values(7, features=model.spec.input_size)
        batch = BatchJob(model, values, np.array([0, 7]))
        await self.engine.run(batch)
        logits, _, _ = alone(model, values, None)
        assert batch.logits.tobytes() == logits[-1:].tobytes()


async def _no_sessions(_: ModelKey, __: bytes) -> int:
    return 0


@asynccontextmanager
async def serving(
    root: Path, keep: int | None = None, poll: float = 0.0, drain_at_least: float = 0.0
) -> AsyncIterator[ServedRepository]:
    """Opens a repository and watches it; see ServedRepository."""
    served = ServedRepository(root, keep, poll, drain_at_least)
    try:
        await served.repository.open()
        served.watcher.start()
        yield served
    finally:
        served.watcher.close()
        served.repository.close()
        await asyncio.to_thread(served.engine.close)
