"""A servicer that answers when a test lets it, and labels each sequence with its length."""

import asyncio
import threading
from typing import Any

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from support.servicers import PartialServicer, zero_answer
from support.waiting import until

from unroll_client import Classification
from unroll_proto.v1 import unroll_pb2 as pb


def labels_of(result: Classification) -> list[str]:
    return result.labels


class Gated(PartialServicer):
    """Answers zeros, and "N steps" as the label of N timesteps, once the gate is open.

    Args:
        hangs: Length in timesteps of sequences whose requests are never answered.
        pushbacks: Number of first requests that are told to retry.
        retry_after: Seconds after which they are to retry.

    Attributes:
        gate: Gate of Classify, closed at first.
        model_gate: Gate of GetModel, open at first.
        requests: Received Classify requests, in order.
        remaining: Seconds of each to its deadline; None without one.
        cancelled: Requests that were cancelled.
        most_in_flight: Most Classify requests that were open at a time.
    """

    def __init__(self, hangs: int = 0, pushbacks: int = 0, retry_after: float = 0.0) -> None:
        self.gate = threading.Event()
        self.model_gate = threading.Event()
        self.model_gate.set()
        self.requests: list[pb.ClassifyRequest] = []
        self.remaining: list[float | None] = []
        self.cancelled: list[pb.ClassifyRequest] = []
        self.lookups = self.most_in_flight = self._in_flight = 0
        self._hangs = hangs
        self._pushbacks = pushbacks
        self._retry_after = retry_after

    async def until(self, requests: int) -> None:
        """Waits until this many requests have arrived."""
        await until(lambda: len(self.requests) >= requests)

    async def until_cancelled(self, requests: int) -> None:
        """Waits until this many requests were cancelled."""
        await until(lambda: len(self.cancelled) >= requests)

    async def Classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:  # noqa: N802
        self.requests.append(request)
        self.remaining.append(context.time_remaining())
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            if len(self.requests) <= self._pushbacks:
                await self._push_back(context)
            await until(lambda: self.gate.is_set() and self._hangs not in request.lengths)
        except asyncio.CancelledError:
            self.cancelled.append(request)
            raise
        finally:
            self._in_flight -= 1
        answer = zero_answer([f"{length} steps" for length in request.lengths])
        if request.return_final_states:
            snapshot = pb.Snapshot(format=1, model="m", version=1, architecture="simple_rnn", state=[bytes(8)])
            answer.final_states.extend([snapshot] * len(request.lengths))
        return answer

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
        self.lookups += 1
        await until(self.model_gate.is_set)
        limits = pb.Limits(max_sequences=1000, max_steps=1000, max_message_bytes=1 << 20)
        model = pb.Model(name="m", version=1, input_size=3, output_size=2, class_labels=["a", "b"], limits=limits)
        return pb.GetModelResponse(model=model)

    async def _push_back(self, context: Any) -> None:
        delay = Duration()
        delay.FromNanoseconds(int(self._retry_after * 1e9))
        status = status_pb2.Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="full")
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        trailers = (("grpc-status-details-bin", status.SerializeToString()),)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", trailers)
