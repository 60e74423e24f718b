"""Server reflection: the services and their messages, for tools without the .proto files."""

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha import reflection_pb2 as pb

SERVICE = reflection.SERVICE_NAME
NAMES = (SERVICE, "grpc.reflection.v1.ServerReflection")
"""Names of the service: v1alpha, and v1, which has the same messages and which tools try first.

Only v1alpha is listed, since grpcio-reflection describes no other."""


class _Pool:
    """Pool of all descriptors, which, unlike protobuf's own, also finds the file of a method."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> Any:
        """See DescriptorPool; `symbol` may also be PACKAGE.SERVICE.METHOD."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service, _, method = symbol.rpartition(".")
            found = self._pool.FindServiceByName(service)
            return found.methods_by_name[method].containing_service.file


def add_reflection(services: Sequence[str], registry: Any) -> None:
    """Registers reflection.

    Args:
        services: Full names of the services to list, beside reflection itself.
        registry: Registry of the methods; see transport/registry.py.
    """
    servicer = reflection.aio.ReflectionServicer([*services, SERVICE], _Pool())
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=pb.ServerReflectionRequest.FromString,
        response_serializer=pb.ServerReflectionResponse.SerializeToString,
    )
    for name in NAMES:
        registry.add_registered_method_handlers(name, {"ServerReflectionInfo": handler})
