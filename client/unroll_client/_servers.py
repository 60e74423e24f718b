"""Servers: a channel to each address, and which of them the next call goes to."""

from __future__ import annotations

import asyncio

import grpc

from unroll_client import _fork
from unroll_client._channel import Connection
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceStub

# Those that are connected go first; those that can't be reached go last.
_RANKS = {
    grpc.ChannelConnectivity.READY: 0,
    grpc.ChannelConnectivity.IDLE: 1,
    grpc.ChannelConnectivity.CONNECTING: 1,
    grpc.ChannelConnectivity.TRANSIENT_FAILURE: 2,
    grpc.ChannelConnectivity.SHUTDOWN: 3,
}


class Servers:
    """The servers of one client, on the running event loop.

    gRPC balances over the addresses of one name by itself. Over several names it does not, so each has a channel.

    Args:
        connection: How to reach them.
    """

    def __init__(self, connection: Connection) -> None:
        self._channels = connection.open()
        _fork.opened(self)
        self._stubs = [UnrollServiceStub(channel) for channel in self._channels]
        self._turn = 0

    def __len__(self) -> int:
        return len(self._channels)

    def next(self) -> UnrollServiceStub:
        """Returns the next server of those that seem alive; of all if none does."""
        count = len(self._channels)
        if count == 1:
            return self._stubs[0]
        turns = [(self._turn + offset) % count for offset in range(count)]
        # Asked for its state, each channel sees to being connected when it is needed.
        chosen = min(turns, key=lambda index: _RANKS[self._channels[index].get_state(try_to_connect=True)])
        self._turn = chosen + 1
        return self._stubs[chosen]

    async def close(self) -> None:
        """Ends the connections."""
        await asyncio.gather(*(channel.close() for channel in self._channels))
        _fork.closed(self)
