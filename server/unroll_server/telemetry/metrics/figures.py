"""Figures counted while serving: of models by the engine, of calls by the middleware, of other parts by themselves.

Plain numbers in shared memory: counting a tick takes 1 microsecond, against 10 by the counters of prometheus_client and
17 in its multiprocess mode. A histogram is its sum, one count for each bucket, and one for larger values. A value of a
traced call becomes the exemplar of its bucket.
"""

from bisect import bisect_left

from unroll_engine.observer import Trace
from unroll_server.telemetry.metrics.exemplars import Exemplars
from unroll_server.telemetry.metrics.memory import Memory

TICK_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
QUEUE_SECONDS = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
LANES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
CALL_SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)

CODES = (
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
)
"""Names of the status codes by number, as in dashboards of gRPC's metrics."""
CAUSES = ("expired", "cancelled")
"""Causes of a dropped sequence: its deadline passed, or its caller left."""
OUTCOMES = (
    "started",
    "advanced",
    "repeated",
    "ended",
    "disconnected",
    "evicted",
    "unknown",
    "expired",
    "taken",
    "room",
    "store",
)
"""Outcomes of sessions and of requests for them, exported from the start: see `ServerMetrics.session`."""
REFUSALS = ("steps", "bytes", "deadline", "identity", "unread")
"""Causes of refusals, exported from the start: see `ServerMetrics.refused`."""
LOADS = ("loaded", "refused")
"""Outcomes of a model version that was found."""

# Of a model version.
REAL, COMPUTED, DROPPED = 0, 1, 2
LOADED = DROPPED + len(CAUSES)
REFUSED = LOADED + 1
FOUND, SERVED, OPEN = range(REFUSED + 1, REFUSED + 4)
TICK = OPEN + 1
WIDTH = TICK + len(TICK_SECONDS) + 2
QUEUE = WIDTH + len(LANES) + 2
MODEL_SIZE = QUEUE + len(QUEUE_SECONDS) + 2
# Of a method.
STARTED, RECEIVED, SENT = range(3)
HANDLED = SENT + 1
HANDLING = HANDLED + len(CODES)
CALL_SIZE = HANDLING + len(CALL_SECONDS) + 2
# Of the server.
QUEUED_STEPS, QUEUED_BYTES, TASKS = range(3)
SERVER_SIZE = 3

GAUGES = {"model": (FOUND, SERVED, OPEN), "runtime": (0,), "server": (QUEUED_STEPS, QUEUED_BYTES, TASKS)}
"""Places of the gauges, by kind."""

_CAUSE = {cause: DROPPED + place for place, cause in enumerate(CAUSES)}


class ModelMetrics:
    """Metrics of one model version. Made by `Metrics.of`; each call takes about a microsecond."""

    def __init__(self, memory: Memory, name: str) -> None:
        self._figures = memory.of("model", name, MODEL_SIZE)
        self._exemplars = Exemplars(memory, "model", name, MODEL_SIZE)

    def tick(self, lanes: int, steps: int, real_steps: int, seconds: float, trace: Trace | None = None) -> None:
        """Counts a tick.

        Args:
            lanes: Sequences in it.
            steps: Timesteps computed for each.
            real_steps: Timesteps, over all lanes, that belonged to sequences; the others were padding.
            seconds: Its duration.
            trace: The trace of a call in it; None if no call is traced.
        """
        figures = self._figures
        figures[REAL] += real_steps
        figures[COMPUTED] += lanes * steps
        figures[TICK] += seconds
        bucket = TICK + 1 + bisect_left(TICK_SECONDS, seconds)
        figures[bucket] += 1
        if trace is not None:
            self._exemplars.keep(bucket, seconds, trace)
        figures[WIDTH] += lanes
        figures[WIDTH + 1 + bisect_left(LANES, lanes)] += 1

    def dropped(self, cause: str, sequences: int) -> None:
        """Counts sequences that were dropped before they were computed.

        Args:
            cause: "expired" (the deadline passed) or "cancelled" (the caller left).
            sequences: Number of sequences.
        """
        self._figures[_CAUSE[cause]] += sequences

    def waited(self, seconds: float, trace: Trace | None = None) -> None:
        """Counts the time of a job in the queue; one that arrived while the tick was planned did not wait."""
        seconds = max(seconds, 0.0)
        bucket = QUEUE + 1 + bisect_left(QUEUE_SECONDS, seconds)
        self._figures[QUEUE] += seconds
        self._figures[bucket] += 1
        if trace is not None:
            self._exemplars.keep(bucket, seconds, trace)

    def opened(self) -> None:
        """Counts a sequence that opens."""
        self._figures[OPEN] += 1

    def closed(self) -> None:
        """Counts a sequence that closes, for any reason."""
        self._figures[OPEN] -= 1

    def serves(self, more: int) -> None:
        """Counts the version as loaded (1) or unloaded (-1) here; its series are exported only while it is loaded."""
        self._figures[SERVED] += more

    def found(self, more: int) -> None:
        """Counts the version as in the repository (1) or gone from it (-1)."""
        self._figures[FOUND] += more

    def loaded(self) -> None:
        """Counts the version as verified and loaded."""
        self._figures[LOADED] += 1

    def refused(self) -> None:
        """Counts the version as found and refused."""
        self._figures[REFUSED] += 1


class CallMetrics:
    """Metrics of one method. Made by `Metrics.method`."""

    def __init__(self, memory: Memory, name: str) -> None:
        self._figures = memory.of("call", name, CALL_SIZE)
        self._exemplars = Exemplars(memory, "call", name, CALL_SIZE)

    def started(self) -> None:
        """Counts a call that has arrived."""
        self._figures[STARTED] += 1

    def handled(self, code: int, seconds: float, received: int = 0, sent: int = 0, trace: Trace | None = None) -> None:
        """Counts a call that has ended.

        Args:
            code: Number of its status.
            seconds: Its duration.
            received: Request messages that are not counted yet.
            sent: Response messages that are not counted yet.
            trace: Its trace; None if it is not traced.
        """
        figures = self._figures
        bucket = HANDLING + 1 + bisect_left(CALL_SECONDS, seconds)
        figures[RECEIVED] += received
        figures[SENT] += sent
        figures[HANDLED + code] += 1
        figures[HANDLING] += seconds
        figures[bucket] += 1
        if trace is not None:
            self._exemplars.keep(bucket, seconds, trace)

    def refused(self, code: int, count: int) -> None:
        """Counts calls that were refused on arrival with this status."""
        figures = self._figures
        figures[STARTED] += count
        figures[HANDLED + code] += count
        figures[HANDLING + 1] += count

    def received(self) -> None:
        """Counts a message that was received."""
        self._figures[RECEIVED] += 1

    def sent(self) -> None:
        """Counts a message that is sent."""
        self._figures[SENT] += 1


class ServerMetrics:
    """Metrics that belong to no model. See `Metrics.server`.

    Attributes:
        queued: Timesteps and bytes that are admitted and not yet answered, [2]; written by the engine.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._figures = memory.of("server", "", SERVER_SIZE)
        self.queued = self._figures[QUEUED_STEPS : QUEUED_BYTES + 1]
        self._counts: dict[tuple[str, str], memoryview[float]] = {}
        # Exported before the first event, so that it shows as an increase.
        for outcome in OUTCOMES:
            self._count("session", outcome, 0)
        for cause in REFUSALS:
            self._count("refused", cause, 0)

    def session(self, outcome: str) -> None:
        """Counts the outcome of a session, or of a request for one.

        Args:
            outcome: "started", "advanced" (steps added), "repeated" (asked again, answered the same), "ended" (by its
                caller), "disconnected" (with its connection), "evicted" (made room for another); and of refused
                requests: "unknown" (no such id), "expired" (unused for too long), "taken" (another writer was first),
                "room" (no room for one more), "store" (the store does not answer).
        """
        self._count("session", outcome, 1)

    def refused(self, cause: str, count: int = 1) -> None:
        """Counts refusals because of a limit.

        Args:
            cause: "steps" or "bytes" queued, "deadline" (too much is queued for an answer in time), "identity" (its
                caller's quota is used up), "unread" (too many answers of its connection are unread).
            count: Number of refusals.
        """
        self._count("refused", cause, count)

    def tasks(self, count: int) -> None:
        """Sets the number of tasks of the event loop."""
        self._figures[TASKS] = count

    def _count(self, kind: str, name: str, more: int) -> None:
        figures = self._counts.get((kind, name))
        if figures is None:
            figures = self._counts[kind, name] = self._memory.of(kind, name, 1)
        figures[0] += more
