"""The gate passes what is right and stops what is wrong: a weight, a state, a bit, a shape, a value."""

import io
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from support.models import random_network
from torch import Tensor

from unroll_export import SimpleRNN
from unroll_export.exporting import BUILDERS, Kind
from unroll_export.graphs.onnx_rnn import build_onnx_rnn
from unroll_export.graphs.onnx_scan import build_onnx_scan
from unroll_export.graphs.torchscript import Unrolled, quiet
from unroll_export.parity.gate import prove
from unroll_export.parity.runners import ParityError
from unroll_proto import bundle

RNN, SCAN, SCRIPT = bundle.MODEL_KINDS
LONGEST = 20
WEIGHTS = list(random_network().state_dict())


def rewired(content: bytes, output: str, *nodes: onnx.NodeProto, **constants: float) -> bytes:
    """The model with its `output` made by `nodes`, which take what it was as `before`."""
    proto = onnx.load_from_string(content)
    for node in proto.graph.node:
        node.output[:] = ["before" if name == output else name for name in node.output]
        node.input[:] = ["before" if name == output else name for name in node.input]
    for name, value in constants.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    proto.graph.node.extend(nodes)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


@pytest.mark.parametrize("sizes", [(3, 8, 4, 1), (1, 1, 1, 1), (4, 6, 1, 2)])
def test_right_artifacts_pass(sizes: tuple[int, int, int, int]) -> None:
    network = random_network(*sizes)
    proofs = prove(network, {kind: build(network) for kind, build in BUILDERS.items()}, LONGEST)
    assert [proof.kind for proof in proofs] == list(BUILDERS)
    for proof in proofs:
        assert proof.bitwise == (proof.kind == SCAN)
        assert proof.max_abs_diff == max(case.max_abs_diff for case in proof.cases) < 2e-6
        assert len(proof.cases) == len({case.name for case in proof.cases})


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("kind", BUILDERS, ids=bundle.FILES.get)
def test_one_changed_value_is_found(kind: Kind, weight: str) -> None:
    network, changed = random_network(), random_network()
    changed.state_dict()[weight].view(-1)[-1] += 1e-3
    with pytest.raises(ParityError, match=r"^model[.a-z]+: case 'random state, length=1 batch=1': differs from eager"):
        prove(network, {kind: BUILDERS[kind](changed)}, LONGEST)


def test_the_smallest_change_of_a_carried_state_is_found() -> None:
    network = random_network()
    nudge = helper.make_node("Mul", ["before", "factor"], ["final_state"])
    content = rewired(build_onnx_scan(network), "final_state", nudge, factor=1 + 2**-23)
    with pytest.raises(ParityError, match=r"^model\.scan\.onnx: case 'chunks of 1, .*values differ in their bits"):
        prove(network, {SCAN: content}, LONGEST)


def test_a_row_that_depends_on_its_neighbours_is_found() -> None:
    network = random_network()
    nodes = (
        helper.make_node("ReduceMean", ["before"], ["over_rows"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["over_rows", "little"], ["leak"]),
        helper.make_node("Add", ["before", "leak"], ["logits"]),
    )
    content = rewired(build_onnx_scan(network), "logits", *nodes, little=1e-6)
    with pytest.raises(ParityError, match=r"^model\.scan\.onnx: case 'rows alone, .*values differ in their bits"):
        prove(network, {SCAN: content}, LONGEST)


class Forgetful(Unrolled):
    """Begins every call at the zero state."""

    def forward(self, input: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: A002
        states, final_state = self.rnn((input - self.mean) / self.std, torch.zeros_like(initial_state))
        return self.fc(states), states, final_state


def test_a_state_that_is_not_carried_is_found() -> None:
    network = random_network().requires_grad_(False)
    buffer = io.BytesIO()
    with quiet():
        torch.jit.save(torch.jit.script(Forgetful(network)), buffer)
    with pytest.raises(ParityError, match=r"^model\.ts: case 'random state"):
        prove(network, {SCRIPT: buffer.getvalue()}, LONGEST)


def frozen(content: bytes, time: int) -> bytes:
    """The model with its time axis fixed, as tracing exporters leave it."""
    proto = onnx.load_from_string(content)
    for value in (*proto.graph.input, *proto.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == "time":
                size.dim_value = time
    return proto.SerializeToString()


def test_a_frozen_time_axis_is_found() -> None:
    network = random_network()
    with pytest.raises(ParityError, match=r"^model\.onnx: case 'random state, length=2 batch=1': "):
        prove(network, {RNN: frozen(build_onnx_rnn(network), 1)}, LONGEST)


@pytest.mark.parametrize("output", ["logits", "states", "final_state"])
def test_what_is_not_a_number_is_found(output: str) -> None:
    network = random_network()
    content = rewired(
        build_onnx_rnn(network), output, helper.make_node("Add", ["before", "nothing"], [output]), nothing=np.nan
    )
    with pytest.raises(ParityError, match="differs from eager PyTorch by nan"):
        prove(network, {RNN: content}, LONGEST)


def test_another_shape_is_found() -> None:
    network = random_network(outputs=4)
    with pytest.raises(
        ParityError, match=r"^model\.onnx: case .*: logits is float32 \(1, 1, 5\), expected .*\(1, 1, 4\)"
    ):
        prove(network, {RNN: build_onnx_rnn(random_network(outputs=5))}, LONGEST)


def test_what_no_runtime_loads_is_refused() -> None:
    for kind in BUILDERS:
        with pytest.raises(ParityError, match=f"^{bundle.FILES[kind]}: can't be loaded: [^\n]+$"):
            prove(random_network(), {kind: b"nothing of the sort"}, LONGEST)


def amplifying(gain: float = 6.0) -> SimpleRNN:
    """A network whose dynamics make much of any rounding."""
    network = random_network(3, 16, 2)
    with torch.no_grad():
        recurrence = network.state_dict()["rnn.weight_hh_l0"]
        recurrence.mul_(gain / torch.linalg.eigvals(recurrence).abs().max())
    return network


def drift(network: SimpleRNN, build: Callable[[SimpleRNN], bytes]) -> bytes:
    """`network` with weights that are off by a little everywhere."""
    changed = SimpleRNN(3, 16, 2)
    changed.load_state_dict({name: value * (1 + 1e-4) for name, value in network.state_dict().items()})
    return build(changed.eval())


def test_amplified_rounding_is_told_from_a_fault() -> None:
    network = amplifying()
    artifacts = {kind: build(network) for kind, build in BUILDERS.items()}
    proofs = prove(network, artifacts, 12)
    names = [case.name for proof in proofs for case in proof.cases]
    assert any("rounding amplified in" in name for name in names)
    assert not any("rounding" in name for name in names if "length=1 " in name)
    for kind, build in BUILDERS.items():
        with pytest.raises(ParityError, match="differs from eager PyTorch"):
            prove(network, {kind: drift(network, build)}, 12)


def test_beyond_twice_the_longest_sequence_nothing_amplifies() -> None:
    network = amplifying()
    proofs = prove(network, {kind: build(network) for kind, build in BUILDERS.items()}, 1)
    assert not any("rounding" in case.name for proof in proofs for case in proof.cases)
