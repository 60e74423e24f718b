"""The gate for every cell: correct artifacts pass, and one wrong weight of any gate is found."""

from typing import Any

import pytest
import torch
from support.models import random_classifier

from unroll_export.exporting import BUILDERS
from unroll_export.graphs.onnx_rnn import build_onnx_rnn
from unroll_export.model import Cell, Nonlinearity, RecurrentClassifier
from unroll_export.parity.gate import prove
from unroll_export.parity.runners import ParityError
from unroll_proto.v1 import bundle_pb2 as pb

NETWORKS: list[tuple[Cell, Nonlinearity]] = [("rnn", "relu"), ("lstm", "tanh"), ("gru", "tanh")]
GATES = {"rnn": 1, "lstm": 4, "gru": 3}
ONNX = pb.ARTIFACT_KIND_ONNX_RNN


def network(cell: Cell, nonlinearity: Nonlinearity, layers: int = 1) -> RecurrentClassifier[Any]:
    return random_classifier(cell, layers=layers, nonlinearity=nonlinearity)


@pytest.mark.parametrize(("cell", "nonlinearity"), NETWORKS)
def test_right_artifacts_pass(cell: Cell, nonlinearity: Nonlinearity) -> None:
    right = network(cell, nonlinearity, layers=2)
    proven = prove(right, {kind: build(right) for kind, build in BUILDERS.items()})
    assert {proof.runtime for proof in proven.proofs} | proven.left_out.keys() == {
        "onnx",
        "scan",
        "kernel",
        "torchscript",
    }
    assert all(0 < proof.worst_ratio < 1 for proof in proven.proofs)


@pytest.mark.parametrize(
    ("cell", "nonlinearity", "weight", "gate"),
    [
        (cell, nonlinearity, weight, gate)
        for cell, nonlinearity in NETWORKS
        for weight in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        for gate in range(GATES[cell])
    ],
)
def test_one_changed_value_of_any_gate_is_found(cell: Cell, nonlinearity: Nonlinearity, weight: str, gate: int) -> None:
    right, changed = network(cell, nonlinearity), network(cell, nonlinearity)
    changed.state_dict()[f"rnn.{weight}_l0"].chunk(GATES[cell])[gate].view(-1)[-1] += 1e-3
    with pytest.raises(
        ParityError, match=r"^model\.onnx \(\w+\): case '(one .* at a time|random .*)': is off from float64"
    ):
        prove(right, {ONNX: build_onnx_rnn(changed)})


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("swap", [(0, 1), (0, 2), (1, 2)])
def test_exchanged_gates_are_found(cell: Cell, swap: tuple[int, int]) -> None:
    right, changed = network(cell, "tanh"), network(cell, "tanh")
    order = list(range(GATES[cell]))
    order[swap[0]], order[swap[1]] = order[swap[1]], order[swap[0]]
    for name, value in changed.rnn.state_dict().items():
        parts = value.chunk(GATES[cell])
        changed.rnn.state_dict()[name].copy_(torch.cat([parts[gate] for gate in order]))
    with pytest.raises(ParityError, match="is off from float64"):
        prove(right, {ONNX: build_onnx_rnn(changed)})


def test_another_nonlinearity_is_found() -> None:
    with pytest.raises(ParityError, match="is off from float64"):
        prove(network("rnn", "tanh"), {ONNX: build_onnx_rnn(network("rnn", "relu"))})
