"""Figures counted while serving: of models by the engine, of calls by the middleware, of the rest by its owner.

Plain numbers in shared memory, because a tick through prometheus_client's own counters took 10 microseconds, 17 in its
multiprocess mode, against one here. A histogram is its sum, then one count a bucket and one for what is above them all.
"""

from bisect import bisect_left

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
"""The names of the status codes, by number, as gRPC's metrics have them in every language's dashboards."""
CAUSES = ("expired", "cancelled")
"""Why a sequence is dropped: its deadline passed, its caller left."""
OUTCOMES = ("started", "advanced", "repeated", "ended", "evicted", "unknown", "expired", "taken", "room", "store")
"""What becomes of a session, or of a request for one, told from the start on: see `ServerMetrics.session`."""
REFUSALS = ("steps", "bytes", "deadline", "identity", "unread")
"""Why calls are refused, told from the start on: see `ServerMetrics.refused`."""
LOADS = ("loaded", "refused", "removed")
"""What becomes of a model version that is found."""

# Of a model.
REAL, COMPUTED, DROPPED = 0, 1, 2
SERVED = DROPPED + len(CAUSES)
OPEN = SERVED + 1
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

GAUGES = {"model": (SERVED, OPEN), "runtime": (0,), "server": (QUEUED_STEPS, QUEUED_BYTES, TASKS)}
"""The places of figures that tell how things are, by kind."""

_CAUSE = {cause: DROPPED + place for place, cause in enumerate(CAUSES)}


class ModelMetrics:
    """The figures of one model. Made by `Metrics.of`; each call takes about a microsecond."""

    def __init__(self, figures: "memoryview[float]") -> None:
        self._figures = figures

    def tick(self, lanes: int, steps: int, real_steps: int, seconds: float) -> None:
        """Counts a tick.

        Args:
            lanes: Sequences in it.
            steps: Timesteps of each that were computed.
            real_steps: Timesteps, over all lanes, that belonged to sequences; the others were padding.
            seconds: How long it took.
        """
        figures = self._figures
        figures[REAL] += real_steps
        figures[COMPUTED] += lanes * steps
        figures[TICK] += seconds
        figures[TICK + 1 + bisect_left(TICK_SECONDS, seconds)] += 1
        figures[WIDTH] += lanes
        figures[WIDTH + 1 + bisect_left(LANES, lanes)] += 1

    def dropped(self, cause: str, sequences: int) -> None:
        """Counts sequences that were dropped before they were computed.

        Args:
            cause: "expired" (the deadline passed) or "cancelled" (the caller left).
            sequences: How many.
        """
        self._figures[_CAUSE[cause]] += sequences

    def waited(self, seconds: float) -> None:
        """Counts the time that work waited in the queue; what came while the tick was planned did not wait."""
        seconds = max(seconds, 0.0)
        self._figures[QUEUE] += seconds
        self._figures[QUEUE + 1 + bisect_left(QUEUE_SECONDS, seconds)] += 1

    def opened(self) -> None:
        """A sequence on a stream begins."""
        self._figures[OPEN] += 1

    def closed(self) -> None:
        """A sequence on a stream ends, in whatever way."""
        self._figures[OPEN] -= 1

    def serves(self, more: int) -> None:
        """The model is loaded here (1) or goes (-1); where it is nowhere, only what was counted is told of it."""
        self._figures[SERVED] += more


class CallMetrics:
    """The figures of one method. Made by `Metrics.method`."""

    def __init__(self, figures: "memoryview[float]") -> None:
        self._figures = figures

    def started(self) -> None:
        """A call has come."""
        self._figures[STARTED] += 1

    def handled(self, code: int, seconds: float, received: int = 0, sent: int = 0) -> None:
        """Counts a call that has ended.

        Args:
            code: Number of its status.
            seconds: Its duration.
            received: Request messages that are not counted yet.
            sent: Response messages that are not counted yet.
        """
        figures = self._figures
        figures[RECEIVED] += received
        figures[SENT] += sent
        figures[HANDLED + code] += 1
        figures[HANDLING] += seconds
        figures[HANDLING + 1 + bisect_left(CALL_SECONDS, seconds)] += 1

    def refused(self, code: int, count: int) -> None:
        """Counts calls that were refused as soon as they came, with this status."""
        figures = self._figures
        figures[STARTED] += count
        figures[HANDLED + code] += count
        figures[HANDLING + 1] += count

    def received(self) -> None:
        """A message has come."""
        self._figures[RECEIVED] += 1

    def sent(self) -> None:
        """A message goes out."""
        self._figures[SENT] += 1


class ServerMetrics:
    """The figures of no model in particular. Its place is `Metrics.server`.

    Attributes:
        queued: Timesteps and bytes that are admitted and not yet answered, [2]; written to by the engine.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._figures = memory.of("server", "", SERVER_SIZE)
        self.queued = self._figures[QUEUED_STEPS : QUEUED_BYTES + 1]
        self._counts: dict[tuple[str, str], memoryview[float]] = {}
        # A counter that is there before it counts shows its first event as one.
        for outcome in OUTCOMES:
            self._count("session", outcome, 0)
        for cause in REFUSALS:
            self._count("refused", cause, 0)

    def session(self, outcome: str) -> None:
        """Counts what became of a session, or of a request for one.

        Args:
            outcome: "started", "advanced" (steps added), "repeated" (asked again, answered the same), "ended" (by its
                caller); "evicted" (made room for another); and of requests refused: "unknown" (no such id), "expired"
                (it rested too long), "taken" (another writer was first), "room" (no room for one more), "store" (the
                store does not answer).
        """
        self._count("session", outcome, 1)

    def refused(self, cause: str, count: int = 1) -> None:
        """Counts work refused because there is too much of something.

        Args:
            cause: "steps" or "bytes" queued, "deadline" (too much is queued for an answer in time), "identity" (its
                caller has had its share), "unread" (too many answers of its connection wait to be read).
            count: The number of refusals.
        """
        self._count("refused", cause, count)

    def tasks(self, count: int) -> None:
        """Notes how many tasks the event loop has."""
        self._figures[TASKS] = count

    def _count(self, kind: str, name: str, more: int) -> None:
        figures = self._counts.get((kind, name))
        if figures is None:
            figures = self._counts[kind, name] = self._memory.of(kind, name, 1)
        figures[0] += more
