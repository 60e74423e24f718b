"""Channelz of a process, and of a supervisor: the entities of every worker, with ids that tell the workers apart.

An id is the worker's own id times the number of workers, plus the number of the worker. See https://github.com/grpc/proposal/blob/master/A14-channelz.md.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from grpc_channelz.v1 import channelz_pb2 as pb
from grpc_channelz.v1 import channelz_pb2_grpc
from grpc_channelz.v1.channelz import ChannelzServicer

from unroll_server.admin.fan_out import CallError, Workers, abort

SERVICE = pb.DESCRIPTOR.services_by_name["Channelz"]

_Method = Callable[[Any, Any, Any], Awaitable[Any]]


def _on_thread(method: str) -> _Method:
    """Wraps a method of grpcio's servicer, which waits for locks of the core, so that the event loop does not block."""

    async def call(self: "Channelz", request: Any, context: Any) -> Any:
        response = await asyncio.to_thread(getattr(ChannelzServicer, method), request, context)
        if response is None:
            # It left a status in the context.
            await context.abort(context.code(), context.details())
        return response

    return call


class Channelz(channelz_pb2_grpc.ChannelzServicer):  # type: ignore[misc]  # it ships no types
    """The channelz service of this process."""

    GetTopChannels = _on_thread("GetTopChannels")
    GetServers = _on_thread("GetServers")
    GetServer = _on_thread("GetServer")
    GetServerSockets = _on_thread("GetServerSockets")
    GetChannel = _on_thread("GetChannel")
    GetSubchannel = _on_thread("GetSubchannel")
    GetSocket = _on_thread("GetSocket")


def _list(method: str, start: str, items: str, subject: str) -> _Method:
    """Returns a method that lists the entities of all workers.

    Args:
        method: Name of the method.
        start: Field of the request with the least id.
        items: Field of the response with the entities.
        subject: Field of an entity's ref with its id.
    """

    async def call(self: "MergedChannelz", request: Any, context: Any) -> Any:
        found: list[Any] = []
        end = True
        for worker in range(self.count):
            inner = type(request)(**{start: self.least_own_id(getattr(request, start), worker)})
            response = await self.call(worker, method, inner, context)
            found += getattr(response, items)
            end &= response.end
        found.sort(key=lambda item: getattr(item.ref, subject))
        most = request.max_results or len(found)
        return type(response)(**{items: found[:most], "end": end and len(found) <= most})

    return call


def _one(method: str, subject: str) -> _Method:
    """Returns a method about one entity, whose id is in the field `subject` of the request."""

    async def call(self: "MergedChannelz", request: Any, context: Any) -> Any:
        own_id, worker = divmod(getattr(request, subject), self.count)
        setattr(request, subject, own_id)
        if method == "GetServerSockets":
            request.start_socket_id = self.least_own_id(request.start_socket_id, worker)
        return await self.call(worker, method, request, context)

    return call


class MergedChannelz(channelz_pb2_grpc.ChannelzServicer):  # type: ignore[misc]  # it ships no types
    """The channelz service of a supervisor.

    Args:
        workers: The workers.

    Attributes:
        count: Number of workers.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self.count = len(workers)

    GetTopChannels = _list("GetTopChannels", "start_channel_id", "channel", "channel_id")
    GetServers = _list("GetServers", "start_server_id", "server", "server_id")
    GetServer = _one("GetServer", "server_id")
    GetServerSockets = _one("GetServerSockets", "server_id")
    GetChannel = _one("GetChannel", "channel_id")
    GetSubchannel = _one("GetSubchannel", "subchannel_id")
    GetSocket = _one("GetSocket", "socket_id")

    def least_own_id(self, start: int, worker: int) -> int:
        """Returns the least of a worker's own ids whose id here is `start` or more."""
        return max(-((worker - start) // self.count), 0)

    async def call(self, worker: int, method: str, request: Message, context: Any) -> Any:
        """Calls a worker and returns its response, with the ids that it has here. A refusal ends the caller's call."""
        try:
            response = await self._workers.call(worker, SERVICE, method, request, context)
        except CallError as error:
            await abort(context, error.status)
        for ref, name in _ids(response):
            setattr(ref, name, getattr(ref, name) * self.count + worker)
        return response


def _ids(message: Message) -> Iterator[tuple[Message, str]]:
    """Yields every id in a message, as the message that has it and the name of its field."""
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in value if isinstance(value, Sequence) or hasattr(value, "add") else [value]:
                yield from _ids(inner)
        elif message.DESCRIPTOR.name.endswith("Ref") and field.name.endswith("_id"):
            yield message, field.name
