"""Servers: a channel to each address, and the choice of the next one."""

from __future__ import annotations

import asyncio

import grpc

from unroll_client import _fork
from unroll_client._channel import Connection
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceStub

# Rank of a channel's state: connected servers first, unreachable ones last.
_RANKS = {
    grpc.ChannelConnectivity.READY: 0,
    grpc.ChannelConnectivity.IDLE: 1,
    grpc.ChannelConnectivity.CONNECTING: 1,
    grpc.ChannelConnectivity.TRANSIENT_FAILURE: 2,
    grpc.ChannelConnectivity.SHUTDOWN: 3,
}


class Server(UnrollServiceStub):
    """Stub of one server, with its channel for methods of other services.

    Args:
        channel: As the attribute.

    Attributes:
        channel: Channel to the server.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        super().__init__(channel)
        self.channel = channel


class Servers:
    """Servers of one client, on the running event loop.

    gRPC balances over the addresses of one name. Over several names it does not, so each name has a channel.

    Args:
        connection: Addresses and credentials of the servers.
    """

    def __init__(self, connection: Connection) -> None:
        self._channels = connection.open()
        _fork.opened(self)
        self._stubs = [Server(channel) for channel in self._channels]
        self._turn = 0

    def __len__(self) -> int:
        return len(self._channels)

    def next(self) -> Server:
        """Returns the next server of those that seem reachable; of all if none does."""
        count = len(self._channels)
        if count == 1:
            return self._stubs[0]
        turns = [(self._turn + offset) % count for offset in range(count)]
        # Asking a channel for its state makes it connect.
        chosen = min(turns, key=lambda index: _RANKS[self._channels[index].get_state(try_to_connect=True)])
        self._turn = chosen + 1
        return self._stubs[chosen]

    async def close(self) -> None:
        """Closes the channels."""
        await asyncio.gather(*(channel.close() for channel in self._channels))
        _fork.closed(self)
