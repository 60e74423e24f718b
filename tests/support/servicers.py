"""A servicer of which a test implements the methods that it needs, and an answer for it."""

from collections.abc import Sequence
from typing import Any

from unroll_proto.v1 import unroll_pb2 as pb
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


def zero_answer(labels: Sequence[str], classes: int = 2, version: int = 1) -> pb.ClassifyResponse:
    """Makes an answer of the model m, with a label and zeros [classes] for each sequence."""
    zeros = bytes(4 * classes * len(labels))
    return pb.ClassifyResponse(
        model="m",
        version=version,
        logits=zeros,
        probabilities=zeros,
        label_indices=[0] * len(labels),
        labels=labels,
    )
