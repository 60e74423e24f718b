"""inference.GRPCInferenceService on a real server, by generated code: details that tritonclient hides."""

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support import wire
from support.oip import outputs_of, request_of
from support.processes import PATIENCE, ServerProcess

from unroll_proto.inference import service_pb2 as pb
from unroll_proto.inference.service_pb2_grpc import GRPCInferenceServiceStub
from unroll_proto.sequences import Sequence as Vowel
from unroll_proto.v1 import unroll_pb2

SERVICE = "inference.GRPCInferenceService"


@pytest.fixture
async def infer(server: ServerProcess) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield GRPCInferenceServiceStub(channel)


def typed(request: pb.ModelInferRequest) -> pb.ModelInferRequest:
    """Converts a request to typed `contents`."""
    (raw,) = request.raw_input_contents
    request.inputs[0].contents.fp32_contents.extend(np.frombuffer(raw, "<f4").tolist())
    request.ClearField("raw_input_contents")
    return request


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def exchange(stub: Any, requests: Sequence[pb.ModelInferRequest]) -> list[pb.ModelStreamInferResponse]:
    """Sends every request at once, half-closes, and reads every response."""
    return [response async for response in stub.ModelStreamInfer(iter(requests))]


def test_health_and_reflection_know_the_service(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        response = check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=PATIENCE)
        assert response.status == health_pb2.HealthCheckResponse.SERVING
        database = ProtoReflectionDescriptorDatabase(channel)
        assert SERVICE in database.get_services()
        service = descriptor_pool.DescriptorPool(database).FindServiceByName(SERVICE)
        assert [method.name for method in service.methods] == [
            *("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer"),
            *("ModelStreamInfer", "ModelConfig", "ModelStatistics", "RepositoryIndex"),
            *("RepositoryModelLoad", "RepositoryModelUnload"),
        ]


async def test_typed_contents_give_the_bits_of_raw_ones_and_answers_are_raw(infer: Any, vowels: list[Vowel]) -> None:
    values = vowels[0].values[np.newaxis]
    raw = await infer.ModelInfer(request_of(values, request_id="one"))
    assert await infer.ModelInfer(typed(request_of(values, request_id="one"))) == raw
    assert (raw.id, raw.model_name, raw.model_version) == ("one", "jv", "1")
    assert not any(output.HasField("contents") for output in raw.outputs)


async def test_what_kserve_s_and_mlserver_s_clients_add_changes_nothing(infer: Any, vowels: list[Vowel]) -> None:
    values = vowels[0].values[np.newaxis]
    plain = await infer.ModelInfer(request_of(values, "logits", "probabilities"))
    # In the format of KServe's InferRequest.to_grpc and MLServer's NumpyRequestCodec.
    kserve = request_of(values, "logits", "probabilities", binary_data_output=True)
    kserve.inputs[0].parameters["binary_data_size"].int64_param = values.nbytes
    kserve.outputs[0].parameters["binary_data"].bool_param = False
    assert await infer.ModelInfer(kserve) == plain
    mlserver = typed(request_of(values, "logits", "probabilities", content_type="np"))
    mlserver.inputs[0].parameters["content_type"].string_param = "np"
    mlserver.outputs[0].parameters["content_type"].string_param = "np"
    assert await infer.ModelInfer(mlserver) == plain
    for name, kind in (("scale", "double_param"), ("binary_data", "int64_param"), ("content_type", "string_param")):
        wrong = request_of(values, "logits")
        setattr(wrong.outputs[0].parameters[name], kind, {"string_param": "pd"}.get(kind, 1))
        code, details = await refusal(infer.ModelInfer(wrong))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert f"outputs[0].parameters[{name}]: " in details


async def test_errors_of_a_call_carry_the_field(infer: Any, vowels: list[Vowel]) -> None:
    request = request_of(vowels[0].values[np.newaxis])
    request.inputs[0].contents.fp32_contents.append(1.0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await infer.ModelInfer(request)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert [field for field, _ in wire.violations_of(wire.details_of(caught.value))] == ["inputs[0].contents"]


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("ModelInfer", pb.ModelInferRequest(model_name="nothing"), "model_name"),
        ("ModelInfer", pb.ModelInferRequest(model_name="jv", model_version="7"), "model_version"),
        ("ModelInfer", pb.ModelInferRequest(model_name="jv", model_version="x"), "model_version"),
        ("ModelInfer", request_of(np.zeros((1, 1, 12), np.float32), sequence_id="nobody"), "parameters[sequence_id]"),
        ("ModelMetadata", pb.ModelMetadataRequest(name="nothing"), "name"),
        ("ModelConfig", pb.ModelConfigRequest(name="jv", version="7"), "version"),
        ("ModelStatistics", pb.ModelStatisticsRequest(name="nothing"), "name"),
        ("ModelReady", pb.ModelReadyRequest(name="jv", version="x"), "version"),
    ],
)
async def test_the_field_at_fault_is_one_of_the_request_s_own(
    infer: Any, method: str, request_: Any, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(infer, method)(request_)
    assert (caught.value.details() or "").startswith(f"{field}: ")
    assert [name for name, _ in wire.violations_of(wire.details_of(caught.value))] == [field]


async def test_a_sequence_goes_on_with_no_other_version(infer: Any, vowels: list[Vowel]) -> None:
    values = vowels[0].values[np.newaxis]
    await infer.ModelInfer(request_of(values, sequence_id="own", sequence_start=True))
    other = request_of(values, sequence_id="own")
    other.model_version = "2"
    code, details = await refusal(infer.ModelInfer(other))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert details.startswith("model_version: the session is of jv/1")


async def test_values_that_are_too_large_for_the_model_are_refused_and_leave_no_trace(
    server: ServerProcess, infer: Any, vowels: list[Vowel]
) -> None:
    values = vowels[0].values[np.newaxis]
    largest = np.full((1, 2, 12), np.finfo(np.float32).max, np.float32)
    refused = grpc.StatusCode.INVALID_ARGUMENT, "are so large that the state of jv/1 is not finite"

    async def is_refused(call: Any, field: str) -> None:
        code, details = await refusal(call)
        assert (code, details.startswith(f"{field}: "), details.endswith(refused[1])) == (refused[0], True, True)

    for outputs in (("logits",), ("states", "final_state")):
        await is_refused(infer.ModelInfer(request_of(np.concatenate([values[:, :2], largest]), *outputs)), "inputs")
        await is_refused(infer.ModelInfer(request_of(largest, *outputs, sequence_id=3, sequence_start=True)), "inputs")
    whole = await infer.ModelInfer(request_of(values, "logits"))
    await infer.ModelInfer(request_of(values[:, :4], sequence_id=3, sequence_start=True))
    await is_refused(infer.ModelInfer(request_of(largest, sequence_id=3)), "inputs")
    rest = await infer.ModelInfer(request_of(values[:, 4:], "logits", sequence_id=3, sequence_end=True))
    assert rest == whole
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = wire.stub_of(channel)
        batch = [values[0], largest[0], values[0]]
        await is_refused(stub.Classify(wire.classify_request(batch, return_final_states=True)), "values")
        chunk = unroll_pb2.Chunk(values=wire.to_bytes(largest))
        requests = [
            unroll_pb2.UnrollRequest(key="k", open=unroll_pb2.OpenSequence(model="jv", return_logits=True)),
            unroll_pb2.UnrollRequest(key="k", chunk=chunk),
            unroll_pb2.UnrollRequest(key="k", chunk=unroll_pb2.Chunk(values=wire.to_bytes(values))),
        ]
        answers = [answer async for answer in stub.Unroll(iter(requests))]
    (error,) = (answer.error for answer in answers if answer.HasField("error"))
    assert (error.code, error.message.partition(":")[0]) == (refused[0].value[0], "chunk.values")
    assert [answer.steps.logits[-36:] for answer in answers if answer.HasField("steps")][-1] == (
        whole.raw_output_contents[0]
    )


@pytest.mark.parametrize(
    ("parameters", "part"),
    [
        ({"sequence_start": True}, "without a sequence_id"),
        ({"sequence_id": 0, "sequence_end": True}, "without a sequence_id"),
        ({"sequence_id": "", "sequence_start": True}, "without a sequence_id"),
        ({"sequence_id": True}, "int64_param or uint64_param or string_param expected"),
        ({"sequence_id": 4, "sequence_start": 1}, "bool_param expected"),
        ({"sequence_id": "x" * 200, "sequence_start": True}, "more than 125 bytes"),
        ({"timeout": -1}, "0 or more expected"),
        ({"timeout": "soon"}, "int64_param or uint64_param expected"),
        ({"priority": -1}, "0 or more expected"),
        ({"sequence": 4}, "unknown; there are sequence_id"),
        ({"content_type": "pd"}, "parameters[content_type]: 'pd', 'np' in string_param expected"),
        ({"binary_data_output": "yes"}, "bool_param expected"),
    ],
)
async def test_wrong_parameters_are_refused(
    infer: Any, vowels: list[Vowel], parameters: dict[str, Any], part: str
) -> None:
    code, details = await refusal(infer.ModelInfer(request_of(vowels[0].values[np.newaxis], **parameters)))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert part in details


async def test_a_sequence_that_has_not_begun_is_an_invalid_argument(infer: Any, vowels: list[Vowel]) -> None:
    request = request_of(vowels[0].values[np.newaxis], sequence_id="never")
    code, details = await refusal(infer.ModelInfer(request))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "sequence 'never' has not begun" in details


async def test_a_sequence_begins_from_a_state_and_its_end_may_hold_no_step(infer: Any, vowels: list[Vowel]) -> None:
    values = vowels[0].values[np.newaxis]
    whole = outputs_of(await infer.ModelInfer(request_of(values, "logits", "final_state")))
    state = outputs_of(await infer.ModelInfer(request_of(values[:, :4], "final_state")))["final_state"]
    opening = request_of(values[:, 4:9], "logits", sequence_id=5, sequence_start=True)
    opening.inputs.add(name="initial_state", datatype="FP32", shape=state.shape)
    opening.raw_input_contents.append(wire.to_bytes(state))
    await infer.ModelInfer(opening)
    rest = outputs_of(await infer.ModelInfer(request_of(values[:, 9:], "logits", sequence_id=5)))
    np.testing.assert_array_equal(rest["logits"], whole["logits"])
    # A refused request leaves the sequence unchanged.
    for wrong, part in (
        (request_of(values[:, :0], "final_state", sequence_id=5), "holds 0 timesteps"),
        (request_of(values[:, :0], "logits", sequence_id=5, sequence_end=True), "`logits` needs a timestep"),
        (request_of(np.concatenate([values, values]), sequence_id=5), "1 allowed"),
        (request_of(values[:, :, :4], sequence_id=5), "has 4 features"),
    ):
        code, details = await refusal(infer.ModelInfer(wrong))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert part in details
    opening.parameters["sequence_start"].bool_param = False
    _, details = await refusal(infer.ModelInfer(opening))
    assert "only for the request that begins" in details
    end = await infer.ModelInfer(request_of(values[:, :0], "final_state", sequence_id=5, sequence_end=True))
    np.testing.assert_array_equal(outputs_of(end)["final_state"], whole["final_state"])
    code, _ = await refusal(infer.ModelInfer(request_of(values, sequence_id=5)))
    assert code == grpc.StatusCode.INVALID_ARGUMENT


async def test_an_end_without_steps_or_outputs_is_acknowledged(infer: Any, vowels: list[Vowel]) -> None:
    values = vowels[0].values[np.newaxis]
    await infer.ModelInfer(request_of(values, sequence_id="e", sequence_start=True))
    end = await infer.ModelInfer(request_of(values[:, :0], request_id="end", sequence_id="e", sequence_end=True))
    assert end == pb.ModelInferResponse(model_name="jv", model_version="1", id="end")


async def test_rows_past_the_length_of_a_sequence_s_chunk_are_not_steps(infer: Any, vowels: list[Vowel]) -> None:
    values = vowels[0].values
    whole = outputs_of(await infer.ModelInfer(request_of(values[np.newaxis], "logits")))["logits"]
    for begin in range(0, len(values), 4):
        chunk = np.full((1, 6, 12), np.nan, np.float32)
        count = len(values[begin : begin + 4])
        chunk[0, :count] = values[begin : begin + 4]
        more: dict[str, Any] = {
            "sequence_id": "p",
            "sequence_start": begin == 0,
            "sequence_end": begin + 4 >= len(values),
        }
        request = request_of(chunk, "logits", "states", **more)
        request.inputs.add(name="lengths", datatype="INT32", shape=[1])
        request.raw_input_contents.append(np.array([count], "<i4").tobytes())
        found = outputs_of(await infer.ModelInfer(request))
        assert found["states"].shape == (1, 6, 128)
        assert not found["states"][0, count:].any()
    np.testing.assert_array_equal(found["logits"], whole)


async def test_errors_on_a_stream_name_the_request_and_the_others_are_answered(infer: Any, vowels: list[Vowel]) -> None:
    values = vowels[0].values[np.newaxis]
    requests = [
        request_of(values, request_id="a"),
        request_of(values, request_id="b", sequence_id="nobody"),
        request_of(values[:, :, :3], request_id="c"),
        request_of(values, request_id="d", sequence_id="somebody", sequence_start=True, sequence_end=True),
        pb.ModelInferRequest(id="e", model_name="nothing"),
        request_of(values, request_id="f"),
    ]
    responses = await exchange(infer, requests)
    by_id = {response.infer_response.id: response for response in responses}
    assert sorted(by_id) == list("abcdef")
    assert len(responses) == 6
    assert {name for name, response in by_id.items() if response.error_message} == set("bce")
    for name in "bce":
        assert not by_id[name].infer_response.outputs
    assert "sequence 'nobody' has not begun" in by_id["b"].error_message
    assert "'nothing' is not served" in by_id["e"].error_message
    # Requests without a sequence are answered in order, however long each takes.
    assert [name for name in (each.infer_response.id for each in responses) if name in "acef"] == list("acef")
    assert outputs_of(by_id["d"].infer_response)["logits"].tobytes() == (
        outputs_of(by_id["a"].infer_response)["logits"].tobytes()
    )


async def test_a_thousand_requests_of_one_sequence_sent_at_once_are_done_in_order(
    infer: Any, vowels: list[Vowel]
) -> None:
    values = np.concatenate([each.values for each in vowels[:60]])[np.newaxis, :1000]
    whole = outputs_of(await infer.ModelInfer(request_of(values, "states")))["states"][0]
    requests = [
        request_of(
            values[:, step : step + 1],
            "states",
            request_id=str(step),
            sequence_id=77,
            sequence_start=step == 0,
            sequence_end=step == values.shape[1] - 1,
        )
        for step in range(values.shape[1])
    ]
    responses = await exchange(infer, requests)
    assert [response.infer_response.id for response in responses] == [str(step) for step in range(len(whole))]
    states = np.concatenate([outputs_of(response.infer_response)["states"][0] for response in responses])
    np.testing.assert_array_equal(states, whole)


async def test_a_short_sequence_does_not_wait_for_a_long_one(infer: Any, vowels: list[Vowel]) -> None:
    long = np.zeros((1, 60000, 12), np.float32)
    short = vowels[0].values[np.newaxis]
    responses = await exchange(
        infer,
        [
            request_of(long, request_id="long", sequence_id=1, sequence_start=True, sequence_end=True),
            request_of(short, request_id="short", sequence_id=2, sequence_start=True, sequence_end=True),
        ],
    )
    assert [response.infer_response.id for response in responses] == ["short", "long"]


async def test_states_over_the_limit_are_refused_before_anything_is_computed(infer: Any) -> None:
    values = np.zeros((4, 40000, 12), np.float32)
    code, details = await refusal(infer.ModelInfer(request_of(values, "states")))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "`states` would take 81920000 bytes" in details


async def test_a_drain_answers_what_was_read_and_ends_the_stream(
    bundle_root: Path, tmp_path: Path, vowels: list[Vowel]
) -> None:
    values = vowels[0].values[np.newaxis]
    with ServerProcess(bundle_root, tmp_path / "log") as process:
        async with grpc.aio.insecure_channel(process.address) as channel:
            call: Any = GRPCInferenceServiceStub(channel).ModelStreamInfer()
            await call.write(request_of(values, request_id="before", sequence_id=1, sequence_start=True))
            assert (await call.read()).infer_response.id == "before"
            process.signal(signal.SIGTERM)
            async with asyncio.timeout(PATIENCE):
                assert await call.code() == grpc.StatusCode.UNAVAILABLE
        assert process.wait() == 0, process.log


async def test_any_worker_goes_on_with_a_sequence_and_all_of_them_are_counted(
    bundle_root: Path, tmp_path: Path, vowels: list[Vowel]
) -> None:
    options = [("grpc.use_local_subchannel_pool", 1)]
    values = vowels[0].values[np.newaxis]
    with ServerProcess(bundle_root, tmp_path / "log", "--workers", "2") as process:
        for step in range(values.shape[1]):
            # A new connection each time, so that the kernel may pick the other worker.
            async with grpc.aio.insecure_channel(process.address, options=options) as channel:
                stub: Any = GRPCInferenceServiceStub(channel)
                request = request_of(values[:, step : step + 1], sequence_id="w", sequence_start=step == 0)
                last = await stub.ModelInfer(request)
        async with grpc.aio.insecure_channel(process.address) as channel:
            stub = GRPCInferenceServiceStub(channel)
            whole = await stub.ModelInfer(request_of(values))
            assert outputs_of(last)["logits"].tobytes() == outputs_of(whole)["logits"].tobytes()
            (statistics,) = (await stub.ModelStatistics(pb.ModelStatisticsRequest(name="jv"))).model_stats
            assert statistics.inference_count == statistics.inference_stats.success.count == values.shape[1] + 1
            assert statistics.inference_stats.fail.count == 0
        assert process.stop() == 0
