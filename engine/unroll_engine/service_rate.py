"""The rate at which a queue is served, by which admission bounds it in time."""

import math

RATE_WINDOW = 0.05
"""Least seconds of work over which the rate is measured."""
RATE_LIFETIME = 10.0
"""Seconds for which a measured rate is used."""
RATE_WEIGHT = 0.3
"""Weight of a single window in the rate."""


class ServiceRate:
    """The rate at which queued units are served while there is always more to do, measured in windows.

    Args:
        ample: Units that must be queued throughout a window for it to show the full rate. With fewer the measured rate
            can be too low, never too high.

    Attributes:
        since: Begin of the window, or the time at which the queue last stopped being empty; set by the owner.
    """

    def __init__(self, ample: float) -> None:
        self._ample = ample
        self._rate: float | None = None
        self._until = -math.inf
        self.since = 0.0
        # State of the window: busy seconds before `since`; units served; fewest units queued.
        self._busy = 0.0
        self._done = 0.0
        self._least = math.inf

    def of(self, now: float) -> float | None:
        """Returns the units served per second under load; None if not measured recently."""
        return self._rate if now < self._until else None

    def end(self, done: float, left: float, now: float) -> None:
        """Records that units left the queue.

        Args:
            done: Units served; 0 if they were dropped.
            left: Units still queued.
            now: Time.
        """
        self._least = min(self._least, left)
        self._done += done
        if not left:
            self._busy += now - self.since
            self.since = now
        if done and (seconds := self._busy + now - self.since) >= RATE_WINDOW:
            self._learn(self._done / seconds, now)
            self.since, self._busy, self._done, self._least = now, 0.0, 0.0, left

    def _learn(self, measured: float, now: float) -> None:
        known = self.of(now)
        if self._least >= self._ample:
            self._rate = measured if known is None else known + RATE_WEIGHT * (measured - known)
            self._until = now + RATE_LIFETIME
        elif known is not None:
            self._rate = max(known, measured)
