"""Client library of Unroll: classify batches of sequences, stream hidden states, keep and resume them.

    with Client("localhost:50051") as client:
        result = client.classify([first, second])        # arrays [steps, features] of any lengths
        result.labels, result.probabilities, result.logits
        with client.unroll() as sequence:
            steps = sequence.send(chunk)                 # steps.states: float32 [steps, hidden_size]
            sequence.snapshot().save("state.bin")

`AsyncClient` has the same methods for asyncio.
"""

from unroll_client import _fork  # noqa: F401 (sets what gRPC reads when it is imported)
from unroll_client._async_client import AsyncClient
from unroll_client._client import Client, SyncSequence
from unroll_client._errors import (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    ServerDraining,
    Unauthenticated,
    Unavailable,
    UnrollError,
)
from unroll_client._sequence import AsyncSequence
from unroll_client._sessions import SessionSteps
from unroll_client._types import Classification, Limits, ModelInfo, Steps
from unroll_proto.snapshot import Snapshot

__all__ = [
    "Aborted",
    "AsyncClient",
    "AsyncSequence",
    "Classification",
    "Client",
    "DeadlineExceeded",
    "FailedPrecondition",
    "FieldViolation",
    "Internal",
    "InvalidArgument",
    "Limits",
    "ModelInfo",
    "NotFound",
    "PermissionDenied",
    "ResourceExhausted",
    "ServerDraining",
    "SessionSteps",
    "Snapshot",
    "Steps",
    "SyncSequence",
    "Unauthenticated",
    "Unavailable",
    "UnrollError",
]
