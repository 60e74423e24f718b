"""Gated cells on a real server: classification, streams, sessions and resumption with the bits of Engine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from support import bundles
from support.models import random_classifier
from support.oip import outputs_of
from support.processes import PATIENCE, ServerProcess

from unroll_client import Client, Snapshot, UnrollError
from unroll_engine import Engine
from unroll_export.model import Cell
from unroll_proto.inference import service_pb2 as pb
from unroll_proto.inference.service_pb2_grpc import GRPCInferenceServiceStub

CELLS: tuple[Cell, ...] = ("lstm", "gru")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cells")
    for cell in CELLS:
        bundles.export(random_classifier(cell, features=3, hidden=12, outputs=4, layers=2), root, cell)
    return root


@pytest.fixture(scope="module", params=["auto", "onnx"])
def cells(repository: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "log"
    with ServerProcess(repository, log, "--runtime", request.param, "--sessions", "memory") as process:
        yield process.address


def sequences_of(count: int) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((3 + 5 * index, 3), np.float32) for index in range(count)]


@pytest.mark.parametrize("cell", CELLS)
def test_streams_sessions_and_batches_have_the_bits_of_the_engine(cell: str, cells: str, repository: Path) -> None:
    with Client(cells) as client, Engine.load(repository / cell, runtime=client.model(cell).runtime) as engine:
        assert client.model(cell).architecture == f"simple_{cell}"
        assert client.model(cell).bitwise
        sequences = sequences_of(6)
        mine = engine.classify(sequences, return_final_states=True)
        theirs = client.classify(sequences, model=cell, return_final_states=True)
        assert theirs.logits.tobytes() == mine.logits.tobytes()
        assert theirs.final_states == mine.final_states
        assert theirs.final_states is not None
        assert [len(snapshot.data) for snapshot in theirs.final_states] == [2 if cell == "lstm" else 1] * 6

        values = sequences[5]
        expected = engine.open().advance(values)
        with client.unroll(cell, logits=True) as stream:
            first = stream.send(values[:9])
            assert first.states is not None
            assert first.states.tobytes() == expected.states[:9].tobytes()
            snapshot = stream.snapshot()
        with client.unroll(snapshot=Snapshot.from_bytes(snapshot.to_bytes()), logits=True) as stream:
            rest = stream.send(values[9:])
        assert rest.logits is not None
        assert rest.logits.tobytes() == expected.logits[9:].tobytes()
        again = client.classify([values[9:]], model=cell, initial_states=[snapshot], return_final_states=True)
        assert again.logits[0].tobytes() == mine.logits[5].tobytes()
        assert mine.final_states is not None
        assert again.final_states == mine.final_states[5:]


def test_a_snapshot_lacks_no_tensor(cells: str) -> None:
    with Client(cells) as client:
        (snapshot,) = client.classify(sequences_of(1), model="lstm", return_final_states=True).final_states or ()
        cut = Snapshot("lstm", 1, "simple_lstm", snapshot.step, snapshot.data[:1], bundle=snapshot.bundle)
        with pytest.raises(UnrollError, match="1 state tensors, 2 expected: state, cell"):
            client.classify(sequences_of(1), model="lstm", initial_states=[cut])


@pytest.mark.parametrize("cell", CELLS)
def test_the_open_inference_protocol_has_every_state_by_name(cell: str, cells: str, repository: Path) -> None:
    names = ["state", "cell"] if cell == "lstm" else ["state"]
    values = sequences_of(3)[2]
    with Client(cells) as client:
        runtime = client.model(cell).runtime
    with Engine.load(repository / cell, runtime=runtime) as engine, grpc.insecure_channel(cells) as channel:
        infer: Any = GRPCInferenceServiceStub(channel)  # type: ignore[arg-type]  # made for both kinds

        def answer(values: NDArray[np.float32], **states: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
            request = pb.ModelInferRequest(model_name=cell)
            for name, array in {"input": values[np.newaxis], **states}.items():
                request.inputs.add(name=name, datatype="FP32", shape=array.shape)
                request.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
            for name in ["logits", *(f"final_{name}" for name in names)]:
                request.outputs.add(name=name)
            return outputs_of(infer.ModelInfer(request, timeout=PATIENCE))

        described = infer.ModelMetadata(pb.ModelMetadataRequest(name=cell), timeout=PATIENCE)
        assert [tensor.name for tensor in described.inputs][2:] == [f"initial_{name}" for name in names]
        assert [tensor.name for tensor in described.outputs][3:] == [f"final_{name}" for name in names]
        first = answer(values[:4])
        second = answer(values[4:], **{f"initial_{name}": first[f"final_{name}"] for name in names})
        whole = engine.classify([values], return_final_states=True)
        assert second["logits"].tobytes() == whole.logits.tobytes()
        assert whole.final_states is not None
        assert [second[f"final_{name}"].tobytes() for name in names] == list(whole.final_states[0].data)
        with pytest.raises(
            grpc.RpcError, match="initial_state with initial_cell" if cell == "lstm" else "initial_cell"
        ):
            answer(values, initial_cell=first["final_state"])
