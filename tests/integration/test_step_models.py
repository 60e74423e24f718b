"""Step models on a real server: outputs by name over both APIs, sessions, snapshots, with the bits of Engine."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper
from support.oip import infer
from support.processes import PATIENCE, ServerProcess, WebProcess
from support.silero import OPTIONS, own_loop, published_file, speech_like
from support.step_graphs import graph, import_examples, import_graph
from support.web import ask

from unroll_client import AsyncClient, Client, InvalidArgument, Snapshot, Steps
from unroll_engine import Engine
from unroll_export.steps.importing import import_step
from unroll_export.steps.plan import Options
from unroll_export.steps.reading import read_source
from unroll_proto.inference import service_pb2 as pb
from unroll_proto.inference.service_pb2_grpc import GRPCInferenceServiceStub

Array = NDArray[Any]


def two_inputs() -> bytes:
    """A graph of two inputs, [batch, 2, 2] and [batch, 1], two outputs, and an offset for a whole sequence."""
    nodes = [
        helper.make_node("Mul", ["image", "gain3"], ["y"]),
        helper.make_node("Unsqueeze", ["gain", "last"], ["gain3"]),
        helper.make_node("Add", ["h", "gain"], ["h_next"]),
        helper.make_node("Add", ["h_next", "offset"], ["total"]),
    ]
    one = ["batch", 1]
    return graph(
        nodes,
        {"image": ["batch", 2, 2], "gain": one, "h": one, "offset": one},
        {"y": ["batch", 2, 2], "total": one, "h_next": one},
        {"last": np.array([2], np.int64)},
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("step-models")
    import_examples(root)
    import_graph(two_inputs(), root, "two", Options(per_sequence=["offset"]))
    return root


@pytest.fixture(scope="module")
def address(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "log"
    with ServerProcess(repository, log, "--sessions", "memory") as process:
        yield process.address


def values_of(steps: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((steps, 3), np.float32)


def test_http_gives_the_outputs_by_name(address: str, tmp_path: Path) -> None:
    values = np.random.default_rng(3).standard_normal((7, 5), np.float32)
    with Client(address) as client, client.unroll("two") as sequence:
        expected = sequence.send(values).outputs
    with WebProcess(address, tmp_path / "log") as web:
        content = {"sequence": values.tolist(), "floats": "hex", "return": ["logits"]}
        _, *steps, (name, _) = ask(web.address, "/v1/models/two:unroll", content).events
        refused = ask(web.address, "/v1/models/elman:classify", {"sequences": [values_of(2).tolist()]})
    assert name == "end"
    assert all(step.keys() == {"step", "outputs"} for _, step in steps)
    for output, rows in expected.items():
        assert b"".join(bytes.fromhex(step["outputs"][output]["hex"]) for _, step in steps) == rows.tobytes()
        assert steps[0][1]["outputs"][output]["shape"] == list(rows.shape[1:])
    assert (refused.status, refused.json["code"]) == (400, "INVALID_ARGUMENT")


def test_streams_and_sessions_have_the_bits_of_the_engine(address: str, repository: Path) -> None:
    values = values_of(40)
    with Client(address) as client, Engine.load(repository / "elman") as engine:
        info = client.model("elman")
        assert (info.architecture, info.form, info.runtime, info.bitwise) == ("step", "published", "onnx", True)
        assert [(each.name, each.shape) for each in info.outputs] == [("y", (4,))]
        assert [(each.name, each.dtype) for each in info.states] == [("h", "float32")]
        expected = engine.open().advance(values).outputs["y"]
        with client.unroll("elman") as sequence:
            first = sequence.send(values[:17])
            kept = sequence.snapshot()
            rest = sequence.send(values[17:])
        assert np.concatenate([first.outputs["y"], rest.outputs["y"]]).tobytes() == expected.tobytes()
        assert engine.open(kept).advance(values[17:]).logits.tobytes() == expected[17:].tobytes()
        with client.unroll(snapshot=Snapshot.from_bytes(kept.to_bytes())) as resumed:
            assert resumed.send(values[17:]).outputs["y"].tobytes() == expected[17:].tobytes()

        parts = [client.advance("s", values[:9], model="elman", start=True), client.advance("s", values[9:])]
        found = np.concatenate([part.logits for part in parts if part.logits is not None])
        assert found.tobytes() == expected.tobytes()
        assert parts[1].label == ""
        assert parts[1].outputs["y"].tobytes() == expected[9:].tobytes()
        with pytest.raises(InvalidArgument, match="elman/1 has no class labels"):
            client.classify([values], model="elman")


def test_many_sequences_share_ticks_and_keep_their_bits(address: str, repository: Path) -> None:
    values = [values_of(20 + index, index) for index in range(50)]
    with Client(address) as client, Engine.load(repository / "elman") as engine:
        open_ = [client.unroll("elman") for _ in values]
        for sequence, own in zip(open_, values, strict=True):
            assert sequence.send(own).logits is not None
        for sequence, own in zip(open_, values, strict=True):
            expected = engine.open().advance(np.concatenate([own, own])).logits[len(own) :]
            assert sequence.send(own).outputs["y"].tobytes() == expected.tobytes()
            sequence.close()


def test_chunks_of_one_moment_run_as_one_job(address: str, repository: Path) -> None:
    values = [values_of(1 + index % 3, index) for index in range(80)]

    async def send() -> list[Steps]:
        async with AsyncClient(address) as client:
            open_ = [client.unroll("elman") for _ in values]
            await asyncio.gather(*[sequence.open() for sequence in open_])
            await asyncio.gather(*[sequence.send(own) for sequence, own in zip(open_, values, strict=True)])
            return await asyncio.gather(*[each.send(own) for each, own in zip(open_, values, strict=True)])

    with Engine.load(repository / "elman") as engine:
        for own, steps in zip(values, asyncio.run(send()), strict=True):
            expected = engine.open().advance(np.concatenate([own, own])).logits[len(own) :]
            assert steps.outputs["y"].tobytes() == expected.tobytes()


def test_classes_come_from_the_labelled_output(address: str, repository: Path) -> None:
    sequences = [values_of(5, 1), values_of(9, 2)]
    with Client(address) as client, Engine.load(repository / "classes") as engine:
        theirs, mine = client.classify(sequences, model="classes"), engine.classify(sequences)
        assert theirs.labels == mine.labels
        assert theirs.probabilities.tobytes() == mine.probabilities.tobytes()
        answer = client.advance("c", sequences[0], model="classes", start=True)
        assert (answer.label, answer.probabilities.tobytes()) == (mine.labels[0], mine.probabilities[0].tobytes())


def test_the_open_inference_protocol_takes_and_gives_tensors_by_name(address: str) -> None:
    rng = np.random.default_rng(0)
    images, gains = rng.standard_normal((3, 5, 2, 2), np.float32), rng.standard_normal((3, 5, 1), np.float32)
    found = infer(address, "two", image=images, gain=gains)
    assert list(found) == ["y", "total"]
    assert found["y"].tobytes() == (images * gains[..., np.newaxis]).tobytes()
    lengths = np.array([5, 2, 3], np.int32)
    offset = np.array([[[0.5]], [[1.0]], [[2.0]]], np.float32)
    wanted = ("total", "final_h", "final_offset")
    ragged = infer(address, "two", wanted, image=images, gain=gains, lengths=lengths, initial_offset=offset)
    assert list(ragged) == list(wanted)
    sums = np.cumsum(gains[..., 0], axis=1, dtype=np.float32) + offset[:, 0]
    for index, length in enumerate(lengths):
        np.testing.assert_allclose(ragged["total"][index, :length, 0], sums[index, :length], rtol=1e-6)
        assert not ragged["total"][index, length:].any()
    assert ragged["final_offset"].tobytes() == offset.tobytes()


def test_a_sequence_by_id_carries_states_of_any_dtype(address: str) -> None:
    zeros = np.zeros((1, 2, 1), np.float32)
    begun = infer(address, "counter", sequence=7, start=True, x=zeros, initial_count=np.array([[[40]]], np.int64))
    assert begun["y"].ravel().tolist() == [40, 41]
    later = infer(address, "counter", ("y", "final_count"), sequence=7, x=zeros)
    assert later["y"].ravel().tolist() == [42, 43]
    assert later["final_count"].tobytes() == np.int64(44).tobytes()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"image": np.zeros((1, 1, 2, 2), np.float32)}, "the input `gain` is missing"),
        (
            {"image": np.zeros((1, 1, 2, 3), np.float32), "gain": np.zeros((1, 1, 1), np.float32)},
            "`image` is [1, 1, 2, 3], two/1 takes ['batch', 'time', 2, 2]",
        ),
        (
            {"image": np.zeros((1, 2, 2, 2), np.float32), "gain": np.zeros((1, 1, 1), np.float32)},
            "`gain` holds 1 timesteps, others hold 2",
        ),
        ({"input": np.zeros((1, 1, 5), np.float32)}, "no input 'input'; there are image, gain, lengths"),
    ],
)
def test_what_is_not_the_model_s_is_refused(address: str, given: dict[str, Any], problem: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        infer(address, "two", **given)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert problem in str(caught.value.details())


def test_metadata_describes_the_graph(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)  # type: ignore[arg-type]  # made for both kinds
        found = stub.ModelMetadata(pb.ModelMetadataRequest(name="counter"), timeout=PATIENCE)
        config = stub.ModelConfig(pb.ModelConfigRequest(name="counter"), timeout=PATIENCE).config
    assert [(each.name, each.datatype, list(each.shape)) for each in found.inputs] == [
        ("x", "FP32", [-1, -1, 1]),
        ("lengths", "INT32", [-1]),
        ("initial_count", "INT64", [-1, 1, 1]),
    ]
    assert [(each.name, each.datatype) for each in found.outputs] == [("y", "FP32"), ("final_count", "INT64")]
    assert (config.platform, [each.optional for each in config.input]) == ("onnxruntime_onnx", [False, True, True])


def test_the_commands_show_outputs_by_name(address: str, tmp_path: Path, repository: Path) -> None:
    values = values_of(3)
    (tmp_path / "s.jsonl").write_text(json.dumps({"sequence": values.tolist()}))

    def command(*arguments: str) -> str:
        words = [str(Path(sys.executable).parent / "unroll"), *arguments, "--server", address]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=PATIENCE)
        return str(done.stdout)

    assert ["elman", "1", "step", "3", ">", "4"] in [line.split()[:6] for line in command("models").splitlines()]
    with Engine.load(repository / "elman") as engine:
        expected = engine.open().advance(values).outputs["y"]
    lines = command("stream", str(tmp_path / "s.jsonl"), "--model", "elman", "--format", "jsonl").splitlines()
    assert [json.loads(line) for line in lines] == [{"step": i, "y": row.tolist()} for i, row in enumerate(expected)]
    shown = command("stream", str(tmp_path / "s.jsonl"), "--model", "elman")
    assert f"y {expected[0, 0]:.4g} " in shown.splitlines()[0]


def test_silero_s_frames_over_the_wire_are_those_of_its_own_loop(tmp_path: Path) -> None:
    path = published_file()
    import_step(read_source(path), OPTIONS, tmp_path / "models" / "vad")
    audio = speech_like(12, 30)
    expected = [own_loop(path, chunks) for chunks in audio]
    with ServerProcess(tmp_path / "models", tmp_path / "log") as process, Client(process.address) as client:
        streams = [client.unroll("vad") for _ in audio]
        frames: list[list[Array]] = [[] for _ in audio]
        for step in range(0, 30, 3):
            for stream, chunks, own in zip(streams, audio, frames, strict=True):
                own.append(stream.send(chunks[step : step + 3]).outputs["output"])
        assert [np.concatenate(own).ravel().tobytes() for own in frames] == [each.tobytes() for each in expected]
        answer = infer(process.address, "vad", input=np.ascontiguousarray(audio))
        assert answer["output"].tobytes() == np.stack(expected).tobytes()
