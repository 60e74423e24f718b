"""Server reflection: what services there are and what their messages are, for tools that have no .proto file."""

from collections.abc import Sequence
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha import reflection_pb2 as pb

SERVICE = reflection.SERVICE_NAME
NAMES = (SERVICE, "grpc.reflection.v1.ServerReflection")
"""Its own name, and that of the newer version, whose messages have the same fields: tools ask for that one first.
Listed is the first alone, since only it is described by grpcio-reflection."""


def add_reflection(services: Sequence[str], registry: Any) -> None:
    """Offers reflection.

    Args:
        services: Full names of the services that are listed beside it.
        registry: What the generated `add_...Servicer_to_server` functions take.
    """
    servicer = reflection.aio.ReflectionServicer([*services, SERVICE])
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=pb.ServerReflectionRequest.FromString,
        response_serializer=pb.ServerReflectionResponse.SerializeToString,
    )
    for name in NAMES:
        registry.add_registered_method_handlers(name, {"ServerReflectionInfo": handler})
