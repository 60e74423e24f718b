"""A servicer of which a test implements the methods that it needs."""

from typing import Any

from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceServicer


class PartialServicer(UnrollServiceServicer):
    """UnrollService without any method: each fails as UNKNOWN until a subclass implements it."""

    async def Classify(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    async def Advance(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    async def GetModel(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    async def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    def Unroll(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError
