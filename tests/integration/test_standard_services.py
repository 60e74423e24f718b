"""Health and reflection as their clients use them, on the listener for callers and on that for operators."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2 as pb
from support.processes import ServerProcess

PATIENCE = 30.0
HEALTH = "grpc.health.v1.Health"
INFERENCE = "inference.GRPCInferenceService"
SERVICES = {
    "callers": {"unroll.v1.UnrollService", INFERENCE, HEALTH},
    "operators": {"unroll.v1.AdminService", INFERENCE, HEALTH, "grpc.channelz.v1.Channelz"},
}


@pytest.fixture(scope="module")
def listeners(bundle_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Returns the addresses of a server's listeners."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        admin = f"127.0.0.1:{free.getsockname()[1]}"
    log = tmp_path_factory.mktemp("standard") / "log"
    with ServerProcess(bundle_root, log, "--admin", admin) as server:
        yield {"callers": server.address, "operators": admin}
        assert server.stop() == 0, server.log
        assert "ERROR" not in server.log


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
@pytest.mark.parametrize("listener", SERVICES)
def test_a_stranger_walks_from_the_services_to_every_file(
    listeners: dict[str, str], listener: str, version: str
) -> None:
    path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
    with grpc.insecure_channel(listeners[listener]) as channel:
        call = channel.stream_stream(
            path, pb.ServerReflectionRequest.SerializeToString, pb.ServerReflectionResponse.FromString
        )

        def ask(*requests: pb.ServerReflectionRequest) -> list[pb.ServerReflectionResponse]:
            # Read to the end of the call, so that its status counts.
            return list(call(iter(requests), timeout=PATIENCE))

        (listed,) = ask(pb.ServerReflectionRequest(list_services=""))
        names = {service.name for service in listed.list_services_response.service}
        assert names - {"grpc.reflection.v1alpha.ServerReflection"} == SERVICES[listener]
        *found, unknown = ask(
            *(pb.ServerReflectionRequest(file_containing_symbol=name) for name in sorted(names)),
            pb.ServerReflectionRequest(file_containing_symbol="no.Such"),
        )
        files = [
            descriptor_pb2.FileDescriptorProto.FromString(raw)
            for response in found
            for raw in response.file_descriptor_response.file_descriptor_proto
        ]
        described = {f"{file.package}.{service.name}" for file in files for service in file.service}
        assert names <= described
        assert {name for file in files for name in file.dependency} <= {file.name for file in files}
        assert unknown.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
        # Each of their symbols is found by its name, as `grpcurl describe` asks for it.
        symbols = {
            f"{file.package}.{inner}": file.name
            for file in files
            for service in file.service
            for inner in (service.name, *(f"{service.name}.{method.name}" for method in service.method))
        } | {f"{file.package}.{message.name}": file.name for file in files for message in file.message_type}
        for name, answer in zip(
            symbols, ask(*(pb.ServerReflectionRequest(file_containing_symbol=name) for name in symbols)), strict=True
        ):
            raws = answer.file_descriptor_response.file_descriptor_proto
            assert symbols[name] in {descriptor_pb2.FileDescriptorProto.FromString(raw).name for raw in raws}, name
        wrong = [f"{INFERENCE}.Nothing", f"{INFERENCE}.", "inference.Nothing.ModelInfer", "", "."]
        for answer in ask(*(pb.ServerReflectionRequest(file_containing_symbol=name) for name in wrong)):
            assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_health_is_checked_listed_and_watched_by_name(listeners: dict[str, str]) -> None:
    serving = health_pb2.HealthCheckResponse.SERVING
    with grpc.insecure_channel(listeners["callers"]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        listed = stub.List(health_pb2.HealthListRequest(), timeout=PATIENCE).statuses
        assert {name: each.status for name, each in listed.items()} == dict.fromkeys(
            ("", "unroll.v1.UnrollService", INFERENCE, "jv", "jv/1"), serving
        )
        for name in listed:
            request = health_pb2.HealthCheckRequest(service=name)
            assert stub.Check(request, timeout=PATIENCE).status == serving
            assert next(stub.Watch(request, timeout=PATIENCE)).status == serving
    with grpc.insecure_channel(listeners["operators"]) as channel:
        assert (
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE).status
            == serving
        )


@pytest.mark.parametrize("path", ["/{0}/ListModels?x=1", "/{0}%2FListModels", "/{0}/List%4dodels", "/{0}/List?Models"])
def test_a_method_has_one_name(listeners: dict[str, str], path: str) -> None:
    with grpc.insecure_channel(listeners["callers"]) as channel:
        method: Any = channel.unary_unary("/unroll.v1.UnrollService/ListModels")
        assert method(b"", timeout=PATIENCE)
        misspelled: Any = channel.unary_unary(path.format("unroll.v1.UnrollService"))
        with pytest.raises(grpc.RpcError) as refused:
            misspelled(b"", timeout=PATIENCE)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
