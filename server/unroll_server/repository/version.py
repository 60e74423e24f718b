"""The life of a model version: its states, its references, its entry in the repository's index."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from unroll_engine.bundle import Fingerprint
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import ModelKey, ModelSpec
from unroll_server.telemetry.metrics import Metrics


class VersionState(StrEnum):
    """State of a version; the value is its name on the wire, see VersionState in admin.proto."""

    LOADING = "LOADING"
    """Being verified, loaded and warmed up."""
    READY = "READY"
    """Accepts new work."""
    DRAINING = "LEAVING"
    """Refuses new work; unloaded once it has no open sequence and no session."""
    UNLOADED = "UNLOADED"
    """Removed from memory and from the index."""
    REFUSED = "REFUSED"
    """Refused, since its files can't be trusted or run."""


class IndexEntry(NamedTuple):
    """A version in the repository's index.

    Attributes:
        name: Name of the model.
        version: Number of the version.
        state: State of the version.
        reason: Reason for REFUSED; for READY, the reason if newer files of the version were refused; else empty.
    """

    name: str
    version: int
    state: VersionState
    reason: str


class LoadedVersion:
    """A model version in memory: READY, then DRAINING, then UNLOADED. Used on one event loop.

    Args:
        model: The model.
        metrics: Counts the version by runtime, and its open sequences.
        on_idle: Called when a draining version has no references left.
        clock: Returns seconds of a clock that never steps.

    Attributes:
        model: The model.
        state: READY, DRAINING or UNLOADED.
        since: Time of the last change of state, on the clock.
        references: Open sequences on the version.
        acquisitions: References taken so far.
    """

    __slots__ = ("_clock", "_metrics", "_on_idle", "acquisitions", "model", "references", "since", "state")

    def __init__(
        self,
        model: Model,
        metrics: Metrics,
        on_idle: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.state = VersionState.READY
        self.since = clock()
        self.references = 0
        self.acquisitions = 0
        self._metrics = metrics
        self._on_idle = on_idle
        self._clock = clock
        self._count(1)

    @property
    def spec(self) -> ModelSpec:
        """The model's spec."""
        return self.model.spec

    @property
    def key(self) -> ModelKey:
        """Name and number of the version."""
        return self.model.spec.key

    @property
    def bundle(self) -> bytes:
        """Id of the content, which distinguishes versions of one key."""
        return self.model.spec.bundle

    @property
    def age(self) -> float:
        """Seconds since the last change of state."""
        return self._clock() - self.since

    def acquire(self) -> None:
        """Adds a reference for a sequence that opens; the version stays loaded until `release`."""
        self.references += 1
        self.acquisitions += 1
        self._metrics.of(str(self.key)).opened()

    def release(self) -> None:
        """Drops a reference."""
        self.references -= 1
        self._metrics.of(str(self.key)).closed()
        if self.state is VersionState.DRAINING and not self.references:
            self._on_idle()

    @contextmanager
    def acquired(self) -> Iterator[Model]:
        """Holds a reference in the context; yields the model."""
        self.acquire()
        try:
            yield self.model
        finally:
            self.release()

    def drain(self) -> None:
        """READY -> DRAINING: new work goes elsewhere, open sequences continue."""
        self._enter(VersionState.DRAINING)
        if not self.references:
            self._on_idle()

    def unload(self) -> None:
        """DRAINING -> UNLOADED: nothing may run on it."""
        self._enter(VersionState.UNLOADED)
        self._count(-1)

    def _enter(self, state: VersionState) -> None:
        self.state = state
        self.since = self._clock()

    def _count(self, more: int) -> None:
        runtime, note = self.model.runtime, self.model.runtime_note
        self._metrics.model_runs(more, str(self.key), runtime.name, runtime.variant, note)


@dataclass(slots=True)
class VersionFiles:
    """The files of a version at the last scan, and the result.

    Attributes:
        seen: Fingerprint of the files.
        loaded: The version loaded from them, or from earlier files if they are refused; None if there is none.
        refused: Reason why they are refused; empty if they are not.
        missed: True if the last scan found no files.
    """

    seen: Fingerprint
    loaded: LoadedVersion | None
    refused: str = ""
    missed: bool = False
