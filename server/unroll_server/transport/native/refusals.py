"""Refusals before a message is read: sessions refuse by headers the calls that an overloaded engine would refuse."""

from collections.abc import Sequence

from unroll_engine.admission import OVERLOADED, AdmissionController
from unroll_engine.errors import OverloadedError
from unroll_server.middleware.errors import refusal_trailers
from unroll_server.status import STATUS
from unroll_server.transport.native._http2 import Server
from unroll_server.transport.registry import ComposedMethod

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
        self.admission = admission
        self._methods = methods
        # Reason of the last refusal by kind of work: bulk, interactive.
        self._reasons = ["", ""]

    def update(self) -> None:
        """Publishes what is refused at this moment; called once a turn of the event loop."""
        for number, method in self._methods:
            if count := self._server.take_refused(number):
                self.admission.record_refused(self._reasons[bool(method.interactive)], count)
                method.counts.refused(_CODE, count)
        for interactive in (False, True):
            refusal = self.admission.refusal(interactive)
            if refusal is None:
                self._server.refuse(interactive, self.admission.clock(), 0.0, 0.0, [], _CODE, "", ())
                continue
            error, until = refusal.error, self.admission.clock() + OVERLOADED
            self._reasons[interactive] = error.reason
            trailers = refusal_trailers(error.description, error.retry_after, error.reason)
            self._server.refuse(
                interactive, until, refusal.rate, refusal.call, refusal.due, _CODE, str(error), trailers
            )
