"""Model repository extension of the Open Inference Protocol, over the admin service.

See https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_repository.md.
"""

from collections.abc import Mapping
from typing import Any

import grpc

from unroll_engine.errors import InvalidRequestError
from unroll_proto.inference import service_pb2 as oip
from unroll_proto.v1 import admin_pb2 as pb
from unroll_proto.v1.admin_pb2_grpc import AdminServiceServicer

SERVICE = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_STATES = {
    pb.VERSION_STATE_READY: "READY",
    pb.VERSION_STATE_LOADING: "LOADING",
    pb.VERSION_STATE_LEAVING: "UNLOADING",
}


class Repository:
    """RepositoryIndex, RepositoryModelLoad and RepositoryModelUnload.

    Args:
        service: Servicer of `unroll.v1.AdminService`.
    """

    def __init__(self, service: AdminServiceServicer) -> None:
        self._service = service

    def handlers(self) -> "dict[str, grpc.RpcMethodHandler[Any, Any]]":
        """Returns the handlers by method. The other methods of the service are not for operators."""
        return {
            name: grpc.unary_unary_rpc_method_handler(
                behavior,
                request_deserializer=getattr(oip, f"{name}Request").FromString,
                response_serializer=getattr(oip, f"{name}Response").SerializeToString,
            )
            for name, behavior in (
                ("RepositoryIndex", self._index),
                ("RepositoryModelLoad", self._load),
                ("RepositoryModelUnload", self._unload),
            )
        }

    async def _index(self, request: oip.RepositoryIndexRequest, context: Any) -> oip.RepositoryIndexResponse:
        found = await self._service.ListVersions(pb.ListVersionsRequest(), context)
        models = [
            oip.RepositoryIndexResponse.ModelIndex(
                name=version.model,
                version=str(version.version),
                state=_STATES.get(version.state, "UNAVAILABLE"),
                reason=version.reason,
            )
            for version in found.versions
            if not request.ready or version.state == pb.VERSION_STATE_READY
        ]
        return oip.RepositoryIndexResponse(models=models)

    async def _load(self, request: oip.RepositoryModelLoadRequest, context: Any) -> oip.RepositoryModelLoadResponse:
        _check(request.parameters, ())
        await self._service.LoadModel(pb.LoadModelRequest(model=request.model_name), context)
        return oip.RepositoryModelLoadResponse()

    async def _unload(
        self, request: oip.RepositoryModelUnloadRequest, context: Any
    ) -> oip.RepositoryModelUnloadResponse:
        # Triton's client always sends this parameter. No model here depends on another.
        _check(request.parameters, ("unload_dependents",))
        await self._service.UnloadModel(pb.UnloadModelRequest(model=request.model_name), context)
        return oip.RepositoryModelUnloadResponse()


def _check(parameters: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in sorted(parameters):
        if name not in known:
            raise InvalidRequestError("models are configured by their bundles alone", f"parameters[{name}]")
