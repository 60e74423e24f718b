"""Channelz over several processes: each one's entities, under ids that are told apart.

An id here is the process's own times the number of processes, plus the number of the process. So one process alone has
the ids that it gave. See https://github.com/grpc/proposal/blob/master/A14-channelz.md.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from grpc_channelz.v1 import channelz_pb2 as pb
from grpc_channelz.v1._servicer import ChannelzServicer

from unroll_server.workers.rpc import Ask

SERVICE = pb.DESCRIPTOR.services_by_name["Channelz"].full_name
PREFIX = "channelz."
"""What the names of its methods begin with among the questions to a process."""
LISTS = {"GetServers": ("start_server_id", "server"), "GetTopChannels": ("start_channel_id", "channel")}
"""The methods that go over all processes, by where the request says to begin and the answer has its list."""
SUBJECTS = {
    "GetServer": "server_id",
    "GetServerSockets": "server_id",
    "GetChannel": "channel_id",
    "GetSubchannel": "subchannel_id",
    "GetSocket": "socket_id",
}
"""The methods that are about one entity, by where the request names it."""


class _Context:
    """The part of a servicer's context that grpcio's own servicer needs."""

    def __init__(self) -> None:
        self.code = grpc.StatusCode.OK
        self.details = ""

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details


def message_of(method: str, suffix: str) -> Any:
    """The class of a method's request or response."""
    return getattr(pb, method + suffix)


def answer(method: str, request: bytes) -> tuple[grpc.StatusCode, str, bytes]:
    """What this process knows: code, details, and the response's bytes."""
    context = _Context()
    found: Any = getattr(ChannelzServicer, method)(message_of(method, "Request").FromString(request), context)
    return context.code, context.details, found.SerializeToString() if found is not None else b""


class Merged:
    """All processes as one.

    Args:
        processes: How each is asked.
        ask: Asks one of them, and ends the call where it refuses.
    """

    def __init__(self, processes: Sequence[Ask], ask: Callable[[int, str, bytes, Any], Awaitable[bytes]]) -> None:
        self._count = len(processes)
        self._ask = ask

    def handlers(self) -> "dict[str, grpc.RpcMethodHandler[Any, Any]]":
        """The handlers of the service, by method."""
        return {
            name: grpc.unary_unary_rpc_method_handler(
                self._list(name) if name in LISTS else self._one(name),
                request_deserializer=message_of(name, "Request").FromString,
                response_serializer=message_of(name, "Response").SerializeToString,
            )
            for name in (*LISTS, *SUBJECTS)
        }

    def _list(self, method: str) -> Any:
        start, items = LISTS[method]

        async def call(request: Any, context: Any) -> Any:
            merged = message_of(method, "Response")()
            found: list[Any] = []
            ended = True
            for number in range(self._count):
                first = -((number - getattr(request, start)) // self._count)
                inner = message_of(method, "Request")(**{start: max(first, 0)})
                response = await self._answer(number, method, inner, context)
                found += getattr(response, items)
                ended &= response.end
            found.sort(key=lambda item: item.ref.server_id if items == "server" else item.ref.channel_id)
            if request.max_results and len(found) > request.max_results:
                del found[request.max_results :]
                ended = False
            getattr(merged, items).extend(found)
            merged.end = ended
            return merged

        return call

    def _one(self, method: str) -> Any:
        subject = SUBJECTS[method]

        async def call(request: Any, context: Any) -> Any:
            inner, number = divmod(getattr(request, subject), self._count)
            setattr(request, subject, inner)
            if method == "GetServerSockets":
                request.start_socket_id = -((number - request.start_socket_id) // self._count)
            return await self._answer(number, method, request, context)

        return call

    async def _answer(self, number: int, method: str, request: Any, context: Any) -> Any:
        raw = await self._ask(number, PREFIX + method, request.SerializeToString(), context)
        response = message_of(method, "Response").FromString(raw)
        for ref, name in _ids(response):
            setattr(ref, name, getattr(ref, name) * self._count + number)
        return response


def _ids(message: Message) -> Iterator[tuple[Message, str]]:
    """Every id in a message: the message that has it, and the name of its field."""
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in value if isinstance(value, Sequence) or hasattr(value, "add") else [value]:
                yield from _ids(inner)
        elif message.DESCRIPTOR.name.endswith("Ref") and field.name.endswith("_id"):
            yield message, field.name
