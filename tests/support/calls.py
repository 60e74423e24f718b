"""Details of a call for the registry."""

from collections.abc import Iterable

import grpc


class CallDetails(grpc.HandlerCallDetails):
    """Details of a call.

    Attributes:
        method: `/package.Service/Method`.
        invocation_metadata: The caller's metadata.
    """

    def __init__(self, method: str, invocation_metadata: Iterable[tuple[str, str | bytes]] = ()) -> None:
        self.method = method
        self.invocation_metadata = tuple(invocation_metadata)
