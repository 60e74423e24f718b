"""Refusals before a message is read: sessions refuse by headers the calls that an overloaded engine would refuse."""

import math
from collections.abc import Sequence

from unroll_engine.admission import OVERLOADED, AdmissionController
from unroll_engine.errors import OverloadedError
from unroll_server.middleware.errors import refusal_trailers
from unroll_server.status import STATUS
from unroll_server.transport.native._http2 import Server
from unroll_server.transport.registry import ComposedMethod

INTERVAL = 0.002
"""Least seconds between two publications."""
REST = 0.05
"""Most seconds for which an overloaded server leaves a connection with refused calls alone."""
REST_SHARE = 1 / 8
"""Their share of the time that the queue takes, so that it never runs empty meanwhile."""
_CODE: int = STATUS[OverloadedError].value[0]


class UnreadRefusals:
    """Configures which calls the sessions refuse, and counts the refused ones.

    Args:
        server: The server of the sessions.
        admission: Returns which calls it would refuse.
        methods: The methods whose calls may be refused, with their numbers at the server.
    """

    def __init__(
        self, server: Server, admission: AdmissionController, methods: Sequence[tuple[int, ComposedMethod]]
    ) -> None:
        self._server = server
        self._admission = admission
        self._methods = methods
        # Reason of the last refusal by kind of work: bulk, interactive.
        self._reasons = ["", ""]
        self._next = -math.inf
        self._is_idle = True

    @property
    def rest(self) -> float:
        """Seconds for which to leave a connection with refused calls alone; 0 if the queue is short."""
        rate = self._admission.rate
        return min(REST, REST_SHARE * self._admission.steps / rate) if rate else 0.0

    def update(self) -> None:
        """Publishes what is refused at this moment; called once a turn of the event loop.

        Also before the first refusal: calls that arrive all at once must not all be taken.
        """
        now = self._admission.clock()
        busy = self._admission.steps > 0 or now < self._admission.overloaded_until
        if now < self._next if busy else self._is_idle:
            # The sessions count what they take meanwhile, so they refuse rather too much than too little.
            return
        self._next, self._is_idle = now + INTERVAL, not busy
        for number, method in self._methods:
            if count := self._server.take_refused(number):
                self._admission.record_refused(self._reasons[method.interactive], count)
                method.counts.refused(_CODE, count)
        for interactive in (False, True):
            refusal = self._admission.refusal(interactive)
            if refusal is None:
                self._server.refuse(interactive, now, 0.0, 0.0, [], _CODE, "", ())
                continue
            error, until = refusal.error, now + OVERLOADED
            self._reasons[interactive] = error.reason
            trailers = refusal_trailers(error.description, error.retry_after, error.reason)
            self._server.refuse(
                interactive, until, refusal.rate, refusal.call, refusal.due, _CODE, str(error), trailers
            )
