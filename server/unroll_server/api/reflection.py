"""Server reflection: what services there are and what their messages are, for tools that have no .proto file."""

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha import reflection_pb2 as pb

SERVICE = reflection.SERVICE_NAME
NAMES = (SERVICE, "grpc.reflection.v1.ServerReflection")
"""Its own name, and that of the newer version, whose messages have the same fields: tools ask for that one first.
Listed is the first alone, since only it is described by grpcio-reflection."""


class _Pool:
    """The pool of all descriptors, which finds the file of a method too: protobuf's own knows no methods."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> Any:
        """See DescriptorPool; `symbol` may be PACKAGE.SERVICE.METHOD, as the protocol says."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service, _, method = symbol.rpartition(".")
            found = self._pool.FindServiceByName(service)
            return found.methods_by_name[method].containing_service.file


def add_reflection(services: Sequence[str], registry: Any) -> None:
    """Offers reflection.

    Args:
        services: Full names of the services that are listed beside it.
        registry: What the generated `add_...Servicer_to_server` functions take.
    """
    servicer = reflection.aio.ReflectionServicer([*services, SERVICE], _Pool())
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=pb.ServerReflectionRequest.FromString,
        response_serializer=pb.ServerReflectionResponse.SerializeToString,
    )
    for name in NAMES:
        registry.add_registered_method_handlers(name, {"ServerReflectionInfo": handler})
