"""How much is done in a second while there is always more to do, measured in windows. The clock is passed in."""

import math

WINDOW = 0.05
"""Seconds of work, at least, that the rate is measured over."""
BELIEF = 10.0
"""Seconds for which a measured rate is believed."""
LEARNING = 0.3
"""How much of the rate a single window tells."""


class Rate:
    """Learns what can be done in a second, whatever it is spent on.

    Args:
        ample: What has to be there throughout a window for it to tell the rate. With less the server is slower than it
            can be, never faster.
    """

    def __init__(self, ample: float) -> None:
        self._ample = ample
        self._rate: float | None = None
        self._until = -math.inf
        # The window: when it began or nothing was left last, busy seconds before that, what was done, least there was.
        self._since = 0.0
        self._busy = 0.0
        self._done = 0.0
        self._least = math.inf

    def of(self, now: float) -> float | None:
        """What is done in a second under load; None where that is not known, or no longer."""
        return self._rate if now < self._until else None

    def begin(self, now: float) -> None:
        """Something is there after nothing was."""
        self._since = now

    def end(self, done: float, left: float, now: float) -> None:
        """Something is over.

        Args:
            done: How much was done with it; 0 where it was left undone.
            left: How much there is besides.
            now: Time.
        """
        self._least = min(self._least, left)
        self._done += done
        if not left:
            self._busy += now - self._since
            self._since = now
        if done and (seconds := self._busy + now - self._since) >= WINDOW:
            self._learn(self._done / seconds, now)
            self._since, self._busy, self._done, self._least = now, 0.0, 0.0, left

    def _learn(self, measured: float, now: float) -> None:
        known = self.of(now)
        if self._least >= self._ample:
            self._rate = measured if known is None else known + LEARNING * (measured - known)
            self._until = now + BELIEF
        elif known is not None:
            self._rate = max(known, measured)
