"""A real server, a real bundle, real data: what the wire promises, seen with the generated client alone."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import given, settings
from hypothesis import strategies as st
from support import wire
from support.processes import ServerProcess, run

from unroll_export.runs import TrainedRun
from unroll_proto.sequences import Sequence
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceStub

TOLERANCE = 1e-5


@pytest.fixture
async def stub(server: ServerProcess) -> AsyncIterator[UnrollServiceStub]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield wire.stub_of(channel)


def eager(run: TrainedRun, values: wire.Array) -> tuple[wire.Array, wire.Array]:
    """Logits [steps, classes] and states [steps, hidden] of one sequence by eager PyTorch."""
    with torch.inference_mode():
        logits, states, _ = run.model.unroll(torch.from_numpy(values)[None])
    return logits[0].numpy(), states[0].numpy()


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
        assert [method.name for method in service.methods] == ["Classify", "Unroll", "ListModels", "GetModel"]


async def test_models_are_described(stub: UnrollServiceStub, trained_run: TrainedRun) -> None:
    listed = await stub.ListModels(pb.ListModelsRequest())
    (model,) = listed.models
    assert (model.name, model.version, model.architecture) == ("jv", 1, "simple_rnn")
    assert (model.input_size, model.hidden_size, model.output_size, model.num_layers) == (12, 128, 9, 1)
    assert tuple(model.class_labels) == trained_run.class_labels
    assert tuple(model.feature_names) == trained_run.feature_names
    assert (model.runtime, model.device, model.artifact) == ("onnx", "cpu", "model.scan.onnx")
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


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_same_bits_alone_batched_chunked_streamed_and_resumed(
    server: ServerProcess, vowels: list[Sequence], data: st.DataObject
) -> None:
    picked = data.draw(st.lists(st.integers(0, len(vowels) - 1), min_size=1, max_size=20))
    sequences = [vowels[index].values for index in picked]
    cuts = [
        sorted(data.draw(st.sets(st.integers(1, len(values) - 1), max_size=4))) if len(values) > 1 else []
        for values in sequences[:4]
    ]

    async def compare() -> None:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = wire.stub_of(channel)
            batched = await stub.Classify(wire.classify_request(sequences, return_final_states=True))
            singles = await asyncio.gather(
                *(stub.Classify(wire.classify_request([values], return_final_states=True)) for values in sequences)
            )
            assert b"".join(single.logits for single in singles) == batched.logits
            assert b"".join(single.probabilities for single in singles) == batched.probabilities
            assert [single.final_states[0] for single in singles] == list(batched.final_states)
            # Streams: all keys on one call, chunks interleaved; each is resumed from its snapshot at a new key.
            whole = [wire.open_request(f"whole {index}") for index in range(len(cuts))]
            whole += [wire.chunk_request(f"whole {index}", 0, sequences[index]) for index in range(len(cuts))]
            undisturbed = await wire.exchange(stub, whole)
            for index, positions in enumerate(cuts):
                await resume(stub, sequences[index], positions, wire.steps_of(undisturbed, f"whole {index}"))
                last = wire.steps_of(undisturbed, f"whole {index}")[-1]
                assert last.logits[-36:] == singles[index].logits

    async def resume(stub: UnrollServiceStub, values: wire.Array, positions: list[int], whole: list[pb.Steps]) -> None:
        opening: dict[str, Any] = {}
        states, logits = b"", b""
        for begin, end in zip([0, *positions], [*positions, len(values)], strict=True):
            responses = await wire.exchange(
                stub,
                [
                    wire.open_request("part", **opening),
                    wire.chunk_request("part", begin, values[begin:end]),
                    wire.snapshot_request("part"),
                ],
            )
            states += b"".join(part.states for part in wire.steps_of(responses, "part"))
            logits += b"".join(part.logits for part in wire.steps_of(responses, "part"))
            opening["initial_state"] = responses[-1].snapshot
            assert opening["initial_state"].step == end
        assert states == b"".join(part.states for part in whole)
        assert logits == b"".join(part.logits for part in whole)

    asyncio.run(compare())


async def test_streamed_states_are_eager_s_and_name_their_steps(
    stub: UnrollServiceStub, trained_run: TrainedRun, vowels: list[Sequence]
) -> None:
    values = np.concatenate([vowels[0].values, vowels[1].values])
    requests = [wire.open_request("a", every=3), wire.chunk_request("a", 0, values[:20])]
    requests += [wire.chunk_request("a", 20, values[20:]), wire.close_request("a")]
    responses = await wire.exchange(stub, requests)
    assert responses[0].opened == pb.SequenceOpened(model="jv", version=1, step=0)
    parts = wire.steps_of(responses, "a")
    step = 0
    for part in parts:
        assert part.first_step == step
        step += part.count
    assert step == len(values)
    _, states = eager(trained_run, values)
    streamed = np.concatenate([wire.to_array(part.states, 128) for part in parts])
    assert np.abs(streamed - states[2::3]).max() <= TOLERANCE
    assert responses[-1].closed.reason == pb.SequenceClosed.REASON_CLOSED
    assert responses[-1].closed.snapshot.step == len(values)


async def test_a_repeated_chunk_is_answered_the_same_and_applied_once(
    stub: UnrollServiceStub, vowels: list[Sequence]
) -> None:
    values = np.concatenate([sequence.values for sequence in vowels[:3]])
    chunks = [wire.chunk_request("a", begin, values[begin : begin + 5]) for begin in range(0, 25, 5)]
    repeated = [chunks[0], chunks[0], chunks[1], chunks[2], chunks[0], chunks[1], chunks[3], chunks[4], chunks[3]]
    plain = await wire.exchange(stub, [wire.open_request("a"), *chunks, wire.close_request("a")])
    disturbed = await wire.exchange(stub, [wire.open_request("a"), *repeated, wire.close_request("a")])
    answers = {part.first_step: part for part in wire.steps_of(plain, "a")}
    assert [part.first_step for part in wire.steps_of(disturbed, "a")] == [0, 0, 5, 10, 0, 5, 15, 20, 15]
    assert all(part == answers[part.first_step] for part in wire.steps_of(disturbed, "a"))
    assert disturbed[-1] == plain[-1]


async def test_errors_of_a_sequence_travel_in_the_stream_and_harm_no_other(
    stub: UnrollServiceStub, vowels: list[Sequence]
) -> None:
    good = vowels[0].values
    bad = good[:4].copy()
    bad[1, 2] = np.nan
    foreign = pb.Snapshot(format=1, model="jv", version=9, architecture="simple_rnn", state=[bytes(512)])
    responses = await wire.exchange(
        stub,
        [
            wire.open_request("good"),
            wire.chunk_request("good", 0, good[:3]),
            wire.chunk_request("nobody", 0, good),
            wire.open_request("unknown", model="nothing"),
            wire.open_request("foreign", version=1, initial_state=foreign),
            wire.open_request("good"),
            wire.chunk_request("good", 7, good[7:]),
            wire.chunk_request("good", 3, bad),
            wire.chunk_request("good", 0, good[1:4]),
            pb.UnrollRequest(key="good"),
            wire.open_request(""),
            wire.open_request("x" * 129),
            wire.chunk_request("good", 3, good[3:]),
            wire.close_request("good"),
        ],
    )
    errors = [(r.key, r.error.code, wire.violations_of(r.error)[0][0]) for r in responses if r.HasField("error")]
    precondition, invalid = grpc.StatusCode.FAILED_PRECONDITION.value[0], grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert [error for error in errors if error[0] == "good"] == [
        ("good", precondition, "key"),
        ("good", precondition, "chunk.first_step"),
        ("good", invalid, "chunk.values"),
        ("good", precondition, "chunk.first_step"),
        ("good", invalid, "action"),
    ]
    assert sorted(error for error in errors if error[0] != "good") == [
        ("", invalid, "key"),
        ("foreign", precondition, "open.initial_state"),
        ("nobody", precondition, "key"),
        ("unknown", grpc.StatusCode.NOT_FOUND.value[0], "open.model"),
        ("x" * 129, invalid, "key"),
    ]
    plain = await wire.exchange(stub, [wire.open_request("good"), wire.chunk_request("good", 0, good)])
    disturbed = b"".join(part.states for part in wire.steps_of(responses, "good"))
    assert disturbed == b"".join(part.states for part in wire.steps_of(plain, "good"))
    assert responses[-1].closed.snapshot.step == len(good)


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
        await stub.Classify(wire.classify_request([long] * 5), timeout=0.1)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await stub.Classify(wire.classify_request([long[:3]]), timeout=60)).labels


async def test_a_full_queue_is_resource_exhausted_and_says_when_to_come_again(
    bundle_root: Path, tmp_path: Path
) -> None:
    long = wire.classify_request([np.zeros((60000, 12), np.float32)] * 5)
    with ServerProcess(bundle_root, tmp_path / "log", "--max-queued-steps", "300001", "--max-lanes", "1") as process:
        async with grpc.aio.insecure_channel(process.address) as channel:
            stub = wire.stub_of(channel)
            answers = await asyncio.gather(*(stub.Classify(long) for _ in range(4)), return_exceptions=True)
            refused = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
            assert 1 <= len(refused) <= 3
            assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            trailers = dict(refused[0].trailing_metadata() or ())
            assert trailers["grpc-retry-pushback-ms"] == "1000"
            assert any("RetryInfo" in detail.type_url for detail in wire.details_of(refused[0]).details)
            assert (await stub.Classify(long)).labels
        assert process.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_drain_ends_calls_in_flight_and_streams_with_their_snapshots(
    bundle_root: Path, tmp_path: Path, vowels: list[Sequence], number: signal.Signals
) -> None:
    values = vowels[0].values
    with ServerProcess(bundle_root, tmp_path / "log") as process:
        async with grpc.aio.insecure_channel(process.address) as channel:
            stub = wire.stub_of(channel)
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            stream = stub.Unroll()
            for request in (wire.open_request("a"), wire.chunk_request("a", 0, values[:5]), wire.open_request("b")):
                await stream.write(request)
            seen = [await stream.read() for _ in range(3)]
            assert all(isinstance(response, pb.UnrollResponse) for response in seen)
            in_flight = asyncio.ensure_future(stub.Classify(wire.classify_request([np.zeros((60000, 12), np.float32)])))
            # One connection keeps the order of its calls: once this one is answered, the long one has begun.
            await stub.GetModel(pb.GetModelRequest())
            process.signal(number)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            rest = []
            while isinstance(response := await stream.read(), pb.UnrollResponse):
                rest.append(response)
            assert await stream.code() == grpc.StatusCode.OK
            assert {response.key: response.closed.snapshot.step for response in rest} == {"a": 5, "b": 0}
            assert {response.closed.reason for response in rest} == {pb.SequenceClosed.REASON_DRAINING}
            assert (await in_flight).labels
            assert process.wait() == 0
    # Elsewhere, the sequence goes on from its snapshot to the same end.
    snapshot = next(response.closed.snapshot for response in rest if response.key == "a")
    with ServerProcess(bundle_root, tmp_path / "log2") as other:
        async with grpc.aio.insecure_channel(other.address) as channel:
            stub = wire.stub_of(channel)
            answer = await stub.Classify(wire.classify_request([values[5:]], initial_states=[snapshot]))
            assert answer.logits == (await stub.Classify(wire.classify_request([values]))).logits


async def test_a_caller_that_vanishes_takes_nothing_with_it(server: ServerProcess, vowels: list[Sequence]) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = wire.stub_of(channel)
        expected = await stub.Classify(wire.classify_request([vowels[0].values]))
        async with grpc.aio.insecure_channel(server.address) as doomed:
            stream = wire.stub_of(doomed).Unroll()
            await stream.write(wire.open_request("a"))
            for step in range(0, 40000, 10000):
                await stream.write(wire.chunk_request("a", step, np.zeros((10000, 12), np.float32)))
            await stream.read()
            stream.cancel()
        assert await stub.Classify(wire.classify_request([vowels[0].values])) == expected


def test_settings_come_from_the_environment_too(bundle_root: Path, tmp_path: Path) -> None:
    with ServerProcess(bundle_root, tmp_path / "log", env={"UNROLL_MAX_SEQUENCES": "7"}) as process:
        with grpc.insecure_channel(process.address) as channel:
            get = channel.unary_unary(
                "/unroll.v1.UnrollService/GetModel",
                request_serializer=pb.GetModelRequest.SerializeToString,
                response_deserializer=pb.GetModelResponse.FromString,
            )
            assert get(pb.GetModelRequest(model="jv"), timeout=10).model.limits.max_sequences == 7
        assert process.stop() == 0


def test_a_port_in_use_ends_the_start_with_one_line(server: ServerProcess, bundle_root: Path) -> None:
    done = run("unroll-serve", "--models", bundle_root, "--listen", server.address, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"unroll-serve: --listen: can't listen on {server.address}")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--models", "/nowhere"], "--models: /nowhere is not a folder"),
        (["--listen", "nonsense"], "--listen: 'nonsense' is not HOST:PORT"),
        (["--max-lanes", "0"], "--max-lanes"),
        (["--runtime", "tensorflow"], "--runtime"),
        (["--device", "cuda"], "--device cuda"),
    ],
)
def test_a_bad_setting_ends_the_start_with_one_line(bundle_root: Path, options: list[str], says: str) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    done = run("unroll-serve", "--models", bundle_root, *options, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr
