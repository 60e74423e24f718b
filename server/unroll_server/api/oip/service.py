"""inference.GRPCInferenceService: the Open Inference Protocol; see docs/open-inference.md."""

import logging
import math
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from importlib.metadata import version as package_version
from typing import Any

from unroll_engine.errors import ModelNotFoundError, RequestError
from unroll_engine.models.loader import Model
from unroll_proto.inference import service_pb2 as pb
from unroll_proto.inference.service_pb2_grpc import GRPCInferenceServiceServicer
from unroll_server.api.data_plane import deadline_of
from unroll_server.api.oip.infer import Inference
from unroll_server.api.oip.metadata import config, metadata
from unroll_server.api.oip.request import version_of
from unroll_server.api.oip.stream import STATUS_FLAG, InferenceStream
from unroll_server.api.streams import OpenStreams
from unroll_server.errors import NotOfferedError
from unroll_server.repository.catalog import Catalog

_log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name


_STATES = {"READY": "READY", "LOADING": "LOADING", "LEAVING": "UNLOADING", "REFUSED": "UNAVAILABLE"}
"""Triton's names of the repository's states of a version."""

Index = Callable[[], Iterable[tuple[str, int, str, str]]]
"""Name, version, state and reason of every version in the repository; see repository.Repository.index."""


class InferenceService(GRPCInferenceServiceServicer):
    """The service. Models are loaded and unloaded on the admin listener.

    Args:
        catalog: The models.
        inference: Answers the requests for inference.
        index: Lists the versions in the repository.
    """

    extensions: Sequence[str] = ("sequence", "classification", "model_configuration", "statistics")
    """Extensions of the protocol that are implemented, by Triton's names."""

    def __init__(self, catalog: Catalog, inference: Inference, index: Index) -> None:
        self._catalog = catalog
        self._inference = inference
        self._index = index
        self._streams = OpenStreams()

    def drain(self, half_close_timeout: float) -> None:
        """Drains every stream; see OpenStreams."""
        self._streams.drain(half_close_timeout)

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:
        """See service.proto."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:
        """See service.proto."""
        return pb.ServerReadyResponse(ready=not self._streams.draining and bool(self._catalog.models))

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:
        """See service.proto; a model that does not exist is not ready, without an error."""
        try:
            self._find(request)
        except ModelNotFoundError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=not self._streams.draining)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Any) -> pb.ServerMetadataResponse:
        """See service.proto."""
        return pb.ServerMetadataResponse(
            name="unroll", version=package_version("unroll-server"), extensions=self.extensions
        )

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        """See service.proto."""
        model = self._find(request)
        return metadata(model, self._versions(model))

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Any) -> pb.ModelConfigResponse:
        """See service.proto."""
        model = self._find(request)
        return pb.ModelConfigResponse(config=config(model, self._versions(model)))

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        """See service.proto."""
        return await self._inference.answer(request, deadline_of(context))

    # grpc.aio accepts this form, which writes; the generated stubs know only the form that yields.
    async def ModelStreamInfer(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Any
    ) -> None:
        """See service.proto; the answers are written to the context."""
        # The deadline ends the stream; each request can have its own timeout.
        stream = InferenceStream(
            lambda each: self._inference.answer(each, math.inf),
            _log_failure,
            self._inference.expected_bytes,
            first_error_ends=any(
                key == STATUS_FLAG and value == "true" for key, value in context.invocation_metadata() or ()
            ),
        )
        await self._streams.run(stream, request_iterator, context.write)

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Any) -> pb.ModelStatisticsResponse:
        """See service.proto."""
        version = version_of(request.version, "version")
        if request.name:
            self._find(request)
        return self._inference.statistics.of(
            [
                model.spec.key
                for model in self._catalog.models
                if request.name in ("", model.spec.key.name) and version in (0, model.spec.key.version)
            ]
        )

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Any) -> pb.RepositoryIndexResponse:
        """See service.proto."""
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=name, version=str(version), state=_STATES[state], reason=reason
                )
                for name, version, state, reason in self._index()
                if state == "READY" or not request.ready
            ]
        )

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Any
    ) -> pb.RepositoryModelLoadResponse:
        """See service.proto."""
        raise NotOfferedError("models are loaded only on the admin listener (--admin)")

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Any
    ) -> pb.RepositoryModelUnloadResponse:
        """See service.proto."""
        raise NotOfferedError("models are unloaded only on the admin listener (--admin)")

    def _find(
        self,
        request: pb.ModelReadyRequest | pb.ModelMetadataRequest | pb.ModelConfigRequest | pb.ModelStatisticsRequest,
    ) -> Model:
        try:
            return self._catalog.find(request.name, version_of(request.version, "version")).model
        except RequestError as error:
            error.rename({"model": "name"})
            raise

    def _versions(self, model: Model) -> list[int]:
        return [each.spec.key.version for each in self._catalog.models if each.spec.key.name == model.spec.key.name]


def _log_failure(error: Exception) -> None:
    _log.error("%s.ModelStreamInfer: a request failed", SERVICE, exc_info=error)
