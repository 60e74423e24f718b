"""The gate passes correct artifacts and stops a wrong weight, state, bit, shape or value."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from support.models import random_network

from unroll_engine.kernel import unavailable_reason
from unroll_engine.models.spec import Float32Array, State
from unroll_engine.runtimes.base import ArrayResult, TickResult
from unroll_engine.runtimes.onnx import OnnxCpuRuntime
from unroll_export import SimpleRNN
from unroll_export.exporting import BUILDERS, Kind
from unroll_export.graphs.onnx_rnn import build_onnx_rnn
from unroll_export.parity.gate import prove
from unroll_export.parity.runners import RUNTIMES, ParityError
from unroll_proto import bundle

RNN, SCRIPT = bundle.MODEL_KINDS
WEIGHTS = list(random_network().state_dict())


@pytest.mark.parametrize("sizes", [(3, 8, 4, 1), (1, 1, 1, 1), (4, 6, 1, 2)])
def test_right_artifacts_pass(sizes: tuple[int, int, int, int]) -> None:
    network = random_network(*sizes)
    proven = prove(network, {kind: build(network) for kind, build in BUILDERS.items()})
    judged = [(proof.kind, proof.runtime, proof.bitwise) for proof in proven.proofs]
    reason = unavailable_reason()
    kernel = [] if reason else [(RNN, "kernel", True)]
    assert judged == [(RNN, "onnx", False), (RNN, "scan", True), *kernel, (SCRIPT, "torchscript", False)]
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


class Nudging(OnnxCpuRuntime):
    """A runner whose final states are off by a rounding."""

    def run(self, x: Float32Array, state: State) -> ArrayResult:
        logits, states, final = super().run(x, state)
        return TickResult(logits, states, tuple(np.nextafter(array, np.float32(2)) for array in final))


class Leaking(OnnxCpuRuntime):
    """A runner that mixes a little of every row into its neighbours."""

    def run(self, x: Float32Array, state: State) -> ArrayResult:
        logits, states, final = super().run(x, state)
        return TickResult(logits + np.float32(2e-7) * logits.mean(axis=1, keepdims=True), states, final)


@pytest.mark.parametrize(("runtime", "case"), [(Nudging, "random chunks, "), (Leaking, "groups of 7 rows, ")])
def test_one_bit_of_what_serves_is_found(
    runtime: type[OnnxCpuRuntime], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = random_network()
    monkeypatch.setitem(RUNTIMES, RNN, {"scan": runtime})
    with pytest.raises(ParityError, match=rf"^model\.onnx \(scan\): case '{case}.*differ in their bits"):
        prove(network, {RNN: build_onnx_rnn(network)})


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


def test_a_graph_that_the_server_can_not_read_is_refused_though_onnxruntime_runs_it() -> None:
    proto = onnx.load_from_string(build_onnx_rnn(random_network()))
    proto.graph.node[-1].op_type = "Max"
    with pytest.raises(ParityError, match=r"^model\.onnx: can't be loaded: node 'logits' \(Max\): no such operator"):
        prove(random_network(), {RNN: proto.SerializeToString()})


def amplifying(gain: float = 6.0) -> SimpleRNN:
    """A network whose dynamics amplify rounding."""
    network = random_network(3, 16, 2)
    with torch.no_grad():
        recurrence = network.state_dict()["rnn.weight_hh_l0"]
        recurrence.mul_(gain / torch.linalg.eigvals(recurrence).abs().max())
    return network


def drift(network: SimpleRNN, build: Callable[[SimpleRNN], bytes]) -> bytes:
    """Returns `network` with all weights slightly off."""
    changed = SimpleRNN(3, 16, 2)
    changed.load_state_dict({name: value * (1 + 1e-4) for name, value in network.state_dict().items()})
    return build(changed.eval())


def test_amplified_rounding_is_told_from_a_fault() -> None:
    network = amplifying()
    prove(network, {kind: build(network) for kind, build in BUILDERS.items()})
    for kind, build in BUILDERS.items():
        with pytest.raises(ParityError, match="is off from float64"):
            prove(network, {kind: drift(network, build)})


@pytest.mark.parametrize("sizes", [(512, 8), (2048, 32), (4000, 128)], ids=str)
def test_wide_inputs_are_honest(sizes: tuple[int, int]) -> None:
    network = random_network(*sizes, 3)
    prove(network, {RNN: build_onnx_rnn(network)})
