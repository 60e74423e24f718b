"""unroll.v1.UnrollService."""

import math
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.models.loader import Model
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceServicer
from unroll_server.api.data_plane import resolve_model
from unroll_server.api.native.advance import advance
from unroll_server.api.native.codec import decode_batch, encode_batch
from unroll_server.api.native.stream import Stream
from unroll_server.config import Limits
from unroll_server.identity.quotas import Usage
from unroll_server.repository.catalog import Catalog
from unroll_server.sessions.service import Sessions


class UnrollService(UnrollServiceServicer):
    """The service over a catalog of models and the engine that runs them.

    Args:
        catalog: The models.
        engine: What runs them.
        limits: What one call may carry.
        sessions: What is kept for callers that hold no state.
        usage: What each identity has open.
    """

    def __init__(self, catalog: Catalog, engine: AsyncEngine, limits: Limits, sessions: Sessions, usage: Usage) -> None:
        self._catalog = catalog
        self._engine = engine
        self._limits = limits
        self._sessions = sessions
        self._usage = usage
        self._streams: set[Stream] = set()
        self._linger: float | None = None

    def drain(self, linger: float) -> None:
        """Ends every stream after what it has read, with a snapshot of each open sequence; opens no new one.

        Args:
            linger: Seconds for which streams wait for their callers to half-close.
        """
        self._linger = linger
        for stream in self._streams:
            stream.drain(linger)

    async def Classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        """See unroll.proto."""
        # All are of the same, or one of them is refused; those without a format are of none.
        begun = next((index for index, snapshot in enumerate(request.initial_states) if snapshot.format), None)
        if begun is None:
            version = self._catalog.find(request.model, request.version)
        else:
            snapshot, field = request.initial_states[begun], f"initial_states[{begun}]"
            version = resolve_model(self._catalog, snapshot, request.model, request.version, field)
        remaining = context.time_remaining()
        deadline = math.inf if remaining is None else time.monotonic() + remaining
        batch = decode_batch(request, version.model, self._limits, deadline)
        await self._engine.run(batch)
        return encode_batch(batch, request)

    async def Unroll(
        self, request_iterator: AsyncIterator[pb.UnrollRequest], context: Any
    ) -> AsyncIterator[pb.UnrollResponse]:
        """See unroll.proto."""
        stream = Stream(self._catalog, self._engine, self._limits, self._usage)
        if self._linger is not None:
            stream.drain(self._linger)
        self._streams.add(stream)
        try:
            async with aclosing(stream.responses(request_iterator)) as responses:
                async for response in responses:
                    yield response
        finally:
            self._streams.remove(stream)

    async def Advance(self, request: pb.AdvanceRequest, context: Any) -> pb.AdvanceResponse:
        """See unroll.proto."""
        return await advance(request, context, self._catalog, self._sessions, self._limits)

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        """See unroll.proto."""
        return pb.ListModelsResponse(models=[self._describe(model) for model in self._catalog.models])

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        """See unroll.proto."""
        # A client asks of the version that its sequence was begun on, which may have begun to leave since.
        version = self._catalog.find(request.model, request.version, resumes=b"")
        return pb.GetModelResponse(model=self._describe(version.model))

    def _describe(self, model: Model) -> pb.Model:
        spec, runtime, limits = model.spec, model.runtime, self._limits
        return pb.Model(
            name=spec.key.name,
            version=spec.key.version,
            architecture=spec.architecture,
            input_size=spec.input_size,
            hidden_size=spec.hidden_size,
            output_size=spec.output_size,
            num_layers=spec.num_layers,
            class_labels=spec.class_labels,
            feature_names=spec.feature_names,
            runtime=runtime.name,
            runtime_note=model.runtime_note,
            runtime_variant=runtime.variant,
            device=runtime.device,
            artifact=runtime.artifact,
            max_abs_diff=model.max_abs_diff,
            bitwise=model.bitwise,
            limits=pb.Limits(
                max_sequences=limits.max_sequences,
                max_steps=limits.max_steps,
                max_open_sequences=limits.max_open_sequences,
                max_message_bytes=limits.max_message_bytes,
            ),
            test_accuracy=model.test_accuracy,
        )
