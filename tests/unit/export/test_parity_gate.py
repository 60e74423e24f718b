"""The gate passes what is right and stops what is wrong: a weight, a state, a bit, a shape, a value."""

import copy
import io
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from support.models import random_network
from torch import Tensor

from unroll_engine.kernel import unavailable_reason
from unroll_export import SimpleRNN
from unroll_export.exporting import BUILDERS, Kind
from unroll_export.graphs.onnx_rnn import build_onnx_rnn
from unroll_export.graphs.onnx_scan import build_onnx_scan
from unroll_export.graphs.torchscript import Unrolled, quiet
from unroll_export.parity.gate import prove
from unroll_export.parity.runners import ParityError
from unroll_proto import bundle

RNN, SCAN, SCRIPT = bundle.MODEL_KINDS
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
    proven = prove(network, {kind: build(network) for kind, build in BUILDERS.items()})
    judged = [(proof.kind, proof.runtime, proof.bitwise) for proof in proven.proofs]
    reason = unavailable_reason()
    kernel = [] if reason else [(RNN, "kernel", True)]
    assert judged == [(RNN, "onnx", False), *kernel, (SCAN, "onnx", True), (SCRIPT, "torchscript", False)]
    assert proven.left_out == ({"kernel": f"kernel: {reason}"} if reason else {})
    for proof in proven.proofs:
        assert proof.max_abs_diff == max(case.max_abs_diff for case in proof.cases) < 2e-6
        assert 0 < proof.worst_ratio == max(case.worst_ratio for case in proof.cases) < 1
        assert len(proof.cases) == len({case.name for case in proof.cases})


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("kind", BUILDERS, ids=bundle.FILES.get)
def test_one_changed_value_is_found(kind: Kind, weight: str) -> None:
    network, changed = random_network(), random_network()
    changed.state_dict()[weight].view(-1)[-1] += 1e-3
    with pytest.raises(ParityError, match=r"^model[.a-z]+ \(\w+\): case 'one .* at a time': is off from float64"):
        prove(network, {kind: BUILDERS[kind](changed)})


def test_the_smallest_change_of_a_carried_state_is_found() -> None:
    network = random_network()
    nudge = helper.make_node("Mul", ["before", "factor"], ["final_state"])
    content = rewired(build_onnx_scan(network), "final_state", nudge, factor=1 + 2**-23)
    with pytest.raises(ParityError, match=r"^model\.scan\.onnx \(onnx\): case 'chunks of 1, .*differ in their bits"):
        prove(network, {SCAN: content})


def test_a_row_that_depends_on_its_neighbours_is_found() -> None:
    network = random_network()
    nodes = (
        helper.make_node("ReduceMean", ["before"], ["over_rows"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["over_rows", "little"], ["leak"]),
        helper.make_node("Add", ["before", "leak"], ["logits"]),
    )
    content = rewired(build_onnx_scan(network), "logits", *nodes, little=2e-7)
    with pytest.raises(ParityError, match=r"^model\.scan\.onnx \(onnx\): case 'rows alone, .*differ in their bits"):
        prove(network, {SCAN: content})


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
    with pytest.raises(ParityError, match=r"^model\.ts \(torchscript\): case 'one unit at a time"):
        prove(network, {SCRIPT: buffer.getvalue()})


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
    with pytest.raises(ParityError, match=r"^model\.onnx \(\w+\): case 'random state, length=2 batch=1': "):
        prove(network, {RNN: frozen(build_onnx_rnn(network), 1)})


@pytest.mark.parametrize("output", ["logits", "states", "final_state"])
def test_what_is_not_a_number_is_found(output: str) -> None:
    network = random_network()
    content = rewired(
        build_onnx_rnn(network), output, helper.make_node("Add", ["before", "nothing"], [output]), nothing=np.nan
    )
    with pytest.raises(ParityError, match="is off from float64 by nan"):
        prove(network, {RNN: content})


def test_another_shape_is_found() -> None:
    network = random_network(outputs=4)
    with pytest.raises(
        ParityError, match=r"^model\.onnx \(\w+\): case .*: logits is float32 \(3, 1, 5\), expected .*\(3, 1, 4\)"
    ):
        prove(network, {RNN: build_onnx_rnn(random_network(outputs=5))})


def test_what_no_runtime_loads_is_refused() -> None:
    for kind in BUILDERS:
        with pytest.raises(ParityError, match=f"^{bundle.FILES[kind]}: can't be loaded: [^\n]+$"):
            prove(random_network(), {kind: b"nothing of the sort"})


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
    prove(network, {kind: build(network) for kind, build in BUILDERS.items()})
    for kind, build in BUILDERS.items():
        with pytest.raises(ParityError, match="is off from float64"):
            prove(network, {kind: drift(network, build)})


def fault(network: SimpleRNN, change: Callable[[dict[str, Tensor]], object]) -> SimpleRNN:
    """A copy of a network with changed weights."""
    changed = copy.deepcopy(network)
    with torch.no_grad():
        change(changed.state_dict())
    return changed


def one_weight(name: str) -> Callable[[dict[str, Tensor]], None]:
    """Makes the median weight of a tensor wrong by 1e-4 of itself."""

    def change(weights: dict[str, Tensor]) -> None:
        values = weights[name].view(-1)
        values[values.abs().argsort()[len(values) // 2]] *= 1 + 1e-4

    return change


def in_half_precision(weights: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        if name.startswith(("rnn.", "fc.")):
            value.copy_(value.half().float())


FAULTS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "a weight of an input": one_weight("rnn.weight_ih_l0"),
    "a weight of a state": one_weight("rnn.weight_hh_l0"),
    "a weight of the readout": one_weight("fc.weight"),
    "no bias": lambda weights: weights["rnn.bias_ih_l0"].zero_(),
    "no bias of the readout": lambda weights: weights["fc.bias"].zero_(),
    "transposed": lambda weights: weights["rnn.weight_hh_l0"].copy_(weights["rnn.weight_hh_l0"].T.clone()),
    "half precision": in_half_precision,
}
SIZES = [(4, 8), (12, 128), (512, 8), (4000, 128)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_wrong_weights_are_found_at_any_size(sizes: tuple[int, int]) -> None:
    network = random_network(*sizes, 5)
    for change in FAULTS.values():
        artifact = build_onnx_rnn(fault(network, change))
        with pytest.raises(ParityError, match="is off from float64"):
            prove(network, {RNN: artifact})


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("wrong", ["relu", "late", "last", "coarse"])
def test_wrong_graphs_are_found_at_any_size(sizes: tuple[int, int], wrong: str) -> None:
    network = random_network(*sizes, 5)
    buffer = io.BytesIO()
    with quiet():
        torch.jit.save(torch.jit.script(Wrong(network.requires_grad_(False), wrong)), buffer)
    with pytest.raises(ParityError, match="is off from float64"):
        prove(network, {SCRIPT: buffer.getvalue()})


class Wrong(Unrolled):
    """A network with a fault of its graph: relu, inputs a step late, readout of the last step, 10-bit inputs."""

    def __init__(self, network: SimpleRNN, wrong: str) -> None:
        super().__init__(network)
        self.wrong = wrong
        if wrong == "relu":
            self.rnn = torch.nn.RNN(
                network.rnn.input_size, network.rnn.hidden_size, batch_first=True, nonlinearity="relu"
            )
            self.rnn.load_state_dict(network.rnn.state_dict())
            self.rnn.requires_grad_(False)

    def forward(self, input: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: A002
        if self.wrong == "late":
            input = torch.cat([input[:, :1], input[:, :-1]], 1)  # noqa: A001
        if self.wrong == "coarse":
            fraction, exponent = torch.frexp(input)
            input = torch.ldexp(torch.round(fraction * 1024) / 1024, exponent)  # noqa: A001
        states, final_state = self.rnn((input - self.mean) / self.std, initial_state)
        if self.wrong == "nan" and input.shape[1] > 3:
            return self.fc(states) * float("nan"), states, final_state
        if self.wrong == "last":
            states = states[:, -1:].expand_as(states)
        return self.fc(states), states, final_state


def test_what_is_not_a_number_after_some_steps_is_found() -> None:
    """Other outputs of the same case, judged later, do not hide it."""
    network = random_network()
    buffer = io.BytesIO()
    with quiet():
        torch.jit.save(torch.jit.script(Wrong(network.requires_grad_(False), "nan")), buffer)
    with pytest.raises(ParityError, match="is off from float64 by nan"):
        prove(network, {SCRIPT: buffer.getvalue()})


@pytest.mark.parametrize("sizes", [(1024, 8), (2048, 32)], ids=str)
def test_wide_inputs_are_honest(sizes: tuple[int, int]) -> None:
    network = random_network(*sizes, 3)
    prove(network, {SCRIPT: BUILDERS[SCRIPT](network), SCAN: build_onnx_scan(network)})
