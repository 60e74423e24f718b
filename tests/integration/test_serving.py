"""Unary calls on a real server with real data, by the generated client."""

import asyncio
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support import wire
from support.eager import TOLERANCE, eager
from support.processes import ServerProcess

from unroll_engine.kernel import isas, unavailable_reason
from unroll_export.runs import TrainedRun
from unroll_proto.sequences import Sequence
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceStub


def test_health_is_serving_for_the_server_and_the_service(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", "unroll.v1.UnrollService"):
            response = check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert response.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_describes_the_service_to_a_client_without_the_proto(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"unroll.v1.UnrollService", "grpc.health.v1.Health"} <= set(database.get_services())
        service = descriptor_pool.DescriptorPool(database).FindServiceByName("unroll.v1.UnrollService")
        methods = ["Classify", "Unroll", "Advance", "ListModels", "GetModel"]
        assert [method.name for method in service.methods] == methods


async def test_models_are_described(stub: UnrollServiceStub, trained_run: TrainedRun) -> None:
    listed = await stub.ListModels(pb.ListModelsRequest())
    (model,) = listed.models
    assert (model.name, model.version, model.architecture) == ("jv", 1, "simple_rnn")
    assert (model.input_size, model.hidden_size, model.output_size, model.num_layers) == (12, 128, 9, 1)
    assert tuple(model.class_labels) == trained_run.class_labels
    assert tuple(model.feature_names) == trained_run.feature_names
    reason = unavailable_reason()
    runtime, variant = ("onnx", "") if reason else ("kernel", isas()[0])
    assert (model.runtime, model.runtime_variant, model.runtime_note) == (runtime, variant, reason or "")
    assert (model.device, model.artifact) == ("cpu", "model.onnx")
    assert model.bitwise
    assert 0 < model.max_abs_diff <= TOLERANCE
    assert model.test_accuracy == pytest.approx(trained_run.summary["test_accuracy"])
    for name in ("jv", ""):
        assert (await stub.GetModel(pb.GetModelRequest(model=name))).model == model


async def test_the_whole_test_split_in_one_request_is_eager_s(
    stub: UnrollServiceStub, trained_run: TrainedRun, vowels: list[Sequence]
) -> None:
    request = wire.classify_request([sequence.values for sequence in vowels], return_final_states=True)
    response = await stub.Classify(request)
    logits = wire.to_array(response.logits, 9)
    probabilities = wire.to_array(response.probabilities, 9)
    assert len(logits) == len(response.labels) == len(response.final_states) == 370
    for index, sequence in enumerate(vowels):
        expected, states = eager(trained_run, sequence.values)
        assert np.abs(logits[index] - expected[-1]).max() <= TOLERANCE
        assert response.labels[index] == trained_run.class_labels[expected[-1].argmax()]
        final = response.final_states[index]
        assert final.step == len(sequence.values)
        assert np.abs(wire.to_array(final.state[0], 128)[-1] - states[-1]).max() <= TOLERANCE
    softmax = torch.softmax(torch.from_numpy(logits.copy()), dim=1).numpy()
    np.testing.assert_allclose(probabilities, softmax, atol=1e-6)


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        (pb.ClassifyRequest(model="nothing", lengths=[1], values=bytes(48)), grpc.StatusCode.NOT_FOUND, "model"),
        (pb.ClassifyRequest(model="jv", version=2), grpc.StatusCode.NOT_FOUND, "version"),
        (pb.ClassifyRequest(model="jv"), grpc.StatusCode.INVALID_ARGUMENT, "lengths"),
        (pb.ClassifyRequest(model="jv", lengths=[0]), grpc.StatusCode.INVALID_ARGUMENT, "lengths[0]"),
        (pb.ClassifyRequest(model="jv", lengths=[1], values=bytes(44)), grpc.StatusCode.INVALID_ARGUMENT, "values"),
        (
            pb.ClassifyRequest(model="jv", lengths=[1], values=wire.to_bytes([np.inf] * 12)),
            grpc.StatusCode.INVALID_ARGUMENT,
            "values",
        ),
        (pb.ClassifyRequest(model="jv", lengths=[1] * 4097), grpc.StatusCode.INVALID_ARGUMENT, "lengths"),
        (pb.ClassifyRequest(model="jv", lengths=[65537]), grpc.StatusCode.INVALID_ARGUMENT, "lengths[0]"),
    ],
)
async def test_a_wrong_request_gets_its_status_and_field_while_others_are_answered(
    stub: UnrollServiceStub,
    vowels: list[Sequence],
    request_: pb.ClassifyRequest,
    code: grpc.StatusCode,
    field: str,
) -> None:
    good = wire.classify_request([vowels[0].values])
    expected = await stub.Classify(good)

    async def refused() -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Classify(request_)
        assert caught.value.code() == code
        assert [name for name, _ in wire.violations_of(wire.details_of(caught.value))] == [field]

    answers = await asyncio.gather(stub.Classify(good), refused(), stub.Classify(good))
    assert answers[0] == answers[2] == expected


async def test_a_message_over_the_limit_is_refused_and_the_server_lives(
    stub: UnrollServiceStub, vowels: list[Sequence]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Classify(pb.ClassifyRequest(model="jv", values=bytes(17 * 2**20)))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await stub.Classify(wire.classify_request([vowels[0].values]))).labels


async def test_a_deadline_ends_a_call_and_the_next_is_answered(stub: UnrollServiceStub) -> None:
    long = np.zeros((65536, 12), np.float32)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Classify(wire.classify_request([long] * 5), timeout=0.05)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await stub.Classify(wire.classify_request([long[:3]]), timeout=60)).labels


async def test_a_full_queue_is_resource_exhausted_and_says_when_to_come_again(
    bundle_root: Path, tmp_path: Path
) -> None:
    long = wire.classify_request([np.zeros((20000, 12), np.float32)] * 5)
    tuning = {"max_queued_steps": 100001, "max_lanes": 1}
    with ServerProcess(bundle_root, tmp_path / "log", tuning=tuning) as process:
        async with grpc.aio.insecure_channel(process.address) as channel:
            stub = wire.stub_of(channel)
            answers = await asyncio.gather(*(stub.Classify(long) for _ in range(4)), return_exceptions=True)
            refused = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
            assert 1 <= len(refused) <= 3
            assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            trailers = dict(refused[0].trailing_metadata() or ())
            assert int(str(trailers["grpc-retry-pushback-ms"])) > 0
            assert any("RetryInfo" in detail.type_url for detail in wire.details_of(refused[0]).details)
            assert (await stub.Classify(long)).labels
        assert process.stop() == 0
