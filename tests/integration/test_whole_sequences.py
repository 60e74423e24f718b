"""Models of whole sequences on a real server: classified alike alone and together; streams and sessions are refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.oip import infer
from support.processes import PATIENCE, ServerProcess
from torch import nn

from unroll_client import Client, InvalidArgument
from unroll_engine import Engine
from unroll_export import export
from unroll_export.bidirectional import BidirectionalClassifier
from unroll_proto.inference import service_pb2 as pb
from unroll_proto.inference.service_pb2_grpc import GRPCInferenceServiceStub

LENGTHS = (3, 40, 1, 17)
REASON = "both/1 takes whole sequences only, since it looks at more than the past"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    network, example = BidirectionalClassifier(nn.GRU(4, 8, 2), 3, "max"), torch.randn(2, 9, 4)
    export(network, name="both", example=example, labels=["a", "b", "c"], models=root)
    return root


@pytest.fixture(scope="module")
def address(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "log"
    with ServerProcess(repository, log, "--sessions", "memory") as process:
        yield process.address


def sequences() -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((length, 4)).astype(np.float32) for length in LENGTHS]


def test_sequences_have_the_bits_of_the_engine_alone_and_together(address: str, repository: Path) -> None:
    values = sequences() * 40
    with Client(address) as client, Engine.load(repository / "both") as engine:
        info = client.model("both")
        assert (info.architecture, info.form, info.bitwise, info.states) == ("whole", "whole", True, ())
        expected = engine.classify(values)
        together = client.classify(values, model="both")
        assert together.logits.tobytes() == expected.logits.tobytes()
        assert together.labels == expected.labels
        for index in range(len(LENGTHS)):
            alone = client.classify([values[index]], model="both")
            assert alone.probabilities[0].tobytes() == expected.probabilities[index].tobytes()


def test_streams_sessions_and_states_are_refused_with_the_reason(address: str) -> None:
    values = sequences()
    with Client(address) as client:
        with pytest.raises(InvalidArgument, match=REASON), client.unroll("both") as stream:
            stream.send(values[0])
        with pytest.raises(InvalidArgument, match=REASON):
            client.advance("s", values[0], model="both", start=True)
        with pytest.raises(InvalidArgument, match=REASON):
            client.classify(values, model="both", return_final_states=True)


def test_the_open_inference_protocol_returns_outputs_of_sequences(address: str, repository: Path) -> None:
    values = sequences()
    padded = np.zeros((len(values), max(LENGTHS), 4), np.float32)
    for row, own in zip(padded, values, strict=True):
        row[: len(own)] = own
    with Engine.load(repository / "both") as engine:
        expected = engine.classify(values).logits
    found = infer(address, "both", values=padded, lengths=np.array(LENGTHS, np.int32))
    assert [(name, array.shape) for name, array in found.items()] == [("output", (4, 3))]
    assert found["output"].tobytes() == expected.tobytes()
    with pytest.raises(grpc.RpcError, match=REASON):
        infer(address, "both", sequence=7, start=True, values=padded[:1])
    with grpc.insecure_channel(address) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)  # type: ignore[arg-type]  # made for both kinds
        described = stub.ModelMetadata(pb.ModelMetadataRequest(name="both"), timeout=PATIENCE)
    assert [(each.name, list(each.shape)) for each in described.inputs] == [("values", [-1, -1, 4]), ("lengths", [-1])]
    assert [(each.name, list(each.shape)) for each in described.outputs] == [("output", [-1, 3])]
