"""Transports, which serve the registered methods on the wire."""

from typing import Protocol


class Transport(Protocol):
    """Serves the methods of a registry on an address.

    Attributes:
        name: Value of `--transport`.
    """

    name: str

    async def start(self) -> str:
        """Listens and serves; returns the address, with the port that it got.

        Raises:
            StartupError: the address can't be listened on.
        """

    async def stop(self, grace: float) -> bool:
        """Refuses new calls, waits for those in flight, and cancels those not done after `grace` seconds.

        Returns:
            False if calls in flight were cancelled.
        """
