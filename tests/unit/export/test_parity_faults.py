"""The gate finds faults of artifacts, in narrow and in wide networks."""

import copy
import io
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from support.models import random_network
from torch import Tensor

from unroll_engine.kernel import unavailable_reason
from unroll_engine.models.spec import Float32Array, State
from unroll_engine.runtimes.base import ArrayResult
from unroll_engine.runtimes.kernel import KernelRuntime
from unroll_export import SimpleRNN
from unroll_export.graphs.onnx_rnn import build_onnx_rnn
from unroll_export.graphs.torchscript import Unrolled, quiet
from unroll_export.parity.gate import prove
from unroll_export.parity.runners import RUNTIMES, ParityError
from unroll_proto.v1 import bundle_pb2 as pb

RNN, SCRIPT = pb.ARTIFACT_KIND_ONNX_RNN, pb.ARTIFACT_KIND_TORCHSCRIPT
Weights = dict[str, Tensor]

SIZES = [(4, 8), (12, 128), (512, 8)]
WIDEST = (4000, 128)
"""Sizes of the network in which the proof allows the most, and takes seconds: for the faults that change the least."""
SLIGHT = {"a weight of an input", "a weight of a state", "a weight between layers", "a weight of the readout"}
SLIGHT |= {"half precision", "coarse inputs", "coarse products"}


def in_sizes(*faults: str) -> pytest.MarkDecorator:
    """Parametrizes a test over faults, each in networks of all sizes; only slight ones in the widest."""
    cases = [
        pytest.param(sizes, wrong, id=f"{wrong}-{sizes[0]}x{sizes[1]}")
        for wrong in faults
        for sizes in (*SIZES, *([WIDEST] if wrong in SLIGHT else []))
    ]
    return pytest.mark.parametrize(("sizes", "wrong"), cases)


def one_weight(name: str) -> Callable[[Weights], None]:
    """Changes the median weight of a tensor by a relative error of 1e-4."""

    def change(weights: Weights) -> None:
        values = weights[name].view(-1)
        values[values.abs().argsort()[len(values) // 2]] *= 1 + 1e-4

    return change


def swapped(one: str, two: str) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        kept = weights[one].clone()
        weights[one].copy_(weights[two])
        weights[two].copy_(kept)

    return change


def transposed(name: str) -> Callable[[Weights], object]:
    return lambda weights: weights[name].copy_(weights[name].T.clone())


def absent(name: str) -> Callable[[Weights], object]:
    return lambda weights: weights[name].zero_()


def in_half_precision(weights: Weights) -> None:
    for name, value in weights.items():
        if name.startswith(("rnn.", "fc.")):
            value.copy_(value.half().float())


FAULTS: dict[str, Callable[[Weights], object]] = {
    "a weight of an input": one_weight("rnn.weight_ih_l0"),
    "a weight of a state": one_weight("rnn.weight_hh_l0"),
    "a weight between layers": one_weight("rnn.weight_ih_l1"),
    "a weight of the readout": one_weight("fc.weight"),
    "no bias of inputs": absent("rnn.bias_ih_l0"),
    "no bias of states": absent("rnn.bias_hh_l1"),
    "no bias of the readout": absent("fc.bias"),
    "layers swapped": swapped("rnn.weight_hh_l0", "rnn.weight_hh_l1"),
    "inputs and states swapped": swapped("rnn.weight_ih_l1", "rnn.weight_hh_l1"),
    "no mean": absent("mean"),
    "no deviation": lambda weights: weights["std"].fill_(1),
    "states transposed": transposed("rnn.weight_hh_l0"),
    "inputs transposed": transposed("rnn.weight_ih_l1"),
    "half precision": in_half_precision,
}


@in_sizes(*FAULTS)
def test_wrong_weights_are_found(sizes: tuple[int, int], wrong: str) -> None:
    network = random_network(*sizes, outputs=5, layers=2)
    changed = copy.deepcopy(network)
    with torch.no_grad():
        FAULTS[wrong](changed.state_dict())
    with pytest.raises(ParityError, match="is off from float64"):
        prove(network, {RNN: build_onnx_rnn(changed)})


class Wrong(Unrolled):
    """A network whose graph has a fault."""

    def __init__(self, network: SimpleRNN, wrong: str) -> None:
        super().__init__(network)
        self.wrong = wrong

    def forward(self, input: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: A002
        wrong, steps = self.wrong, input.shape[1]
        if wrong == "late":
            input = torch.cat([input[:, :1], input[:, :-1]], 1)  # noqa: A001
        if wrong == "early":
            input = torch.cat([input[:, 1:], input[:, -1:]], 1)  # noqa: A001
        if wrong == "coarse inputs":
            input = self.coarse(input)  # noqa: A001
        if wrong == "no state" or (wrong == "no state of chunks" and steps > 1):
            initial_state = torch.zeros_like(initial_state)
        values = (input - self.mean) / self.std
        if wrong == "coarse products":
            values, initial_state = self.coarse(values), self.coarse(initial_state)
        states, final_state = self.rnn(values, initial_state)
        if wrong == "no number" and steps > 3:
            return self.fc(states) * float("nan"), states, final_state
        if wrong == "no number in states":
            return self.fc(states), states * float("nan"), final_state
        if wrong == "no number in the final state":
            return self.fc(states), states, final_state * float("nan")
        if wrong == "stale state" and steps > 1:
            final_state = states[:, -2].unsqueeze(0)
        if wrong == "state of the first row":
            final_state = final_state[:, :1].expand_as(final_state)
        if wrong == "last":
            states = states[:, -1:].expand_as(states)
        return self.fc(states), states, final_state

    def coarse(self, values: Tensor) -> Tensor:
        """Rounds to 10 bits, as TF32 does."""
        fraction, exponent = torch.frexp(values)
        return torch.ldexp(torch.round(fraction * 2048) / 2048, exponent)


def script(network: SimpleRNN, wrong: str) -> bytes:
    buffer = io.BytesIO()
    with quiet():
        torch.jit.save(torch.jit.script(Wrong(network.requires_grad_(False), wrong)), buffer)
    return buffer.getvalue()


@in_sizes(
    "late",
    "early",
    "last",
    "coarse inputs",
    "coarse products",
    "no state",
    "no state of chunks",
    "stale state",
    "state of the first row",
)
def test_wrong_graphs_are_found(sizes: tuple[int, int], wrong: str) -> None:
    network = random_network(*sizes, outputs=5)
    with pytest.raises(ParityError, match="is off from float64"):
        prove(network, {SCRIPT: script(network, wrong)})


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_relu_for_tanh_is_found(sizes: tuple[int, int]) -> None:
    network = random_network(*sizes, outputs=5)
    proto = onnx.load_from_string(build_onnx_rnn(network))
    (node,) = (node for node in proto.graph.node if node.op_type == "RNN")
    kept = [attribute for attribute in node.attribute if attribute.name != "activations"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("activations", ["Relu"])])
    with pytest.raises(ParityError, match="is off from float64"):
        prove(network, {RNN: proto.SerializeToString()})


@pytest.mark.parametrize("wrong", ["no number", "no number in states", "no number in the final state"])
def test_what_is_not_a_number_is_found(wrong: str) -> None:
    """Neither later outputs of the same case nor earlier steps hide it."""
    network = random_network()
    with pytest.raises(ParityError, match="is off from float64 by nan"):
        prove(network, {SCRIPT: script(network, wrong)})


class Forgetful(KernelRuntime):
    """The kernel with a fault: later chunks of a sequence begin at the zero state."""

    def run(self, x: Float32Array, state: State) -> ArrayResult:
        result = super().run(x, state)
        return result._replace(final_state=tuple(np.zeros_like(tensor) for tensor in result.final_state))


class Crowded(KernelRuntime):
    """The kernel with a fault: with more than 100 lanes a bit differs."""

    def run(self, x: Float32Array, state: State) -> ArrayResult:
        result = super().run(x, state)
        return result._replace(logits=np.nextafter(result.logits, np.float32(9))) if x.shape[1] > 100 else result


@pytest.mark.skipif(unavailable_reason() is not None, reason=f"kernel: {unavailable_reason()}")
@pytest.mark.parametrize(
    ("runtime", "says"),
    [(Forgetful, "one feature at a time': is off"), (Crowded, "groups of 7 rows, .* values differ in their bits")],
)
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch, runtime: type[KernelRuntime], says: str) -> None:
    network = random_network()
    monkeypatch.setitem(RUNTIMES, RNN, {**RUNTIMES[RNN], "kernel": runtime})
    with pytest.raises(ParityError, match=rf"^model\.onnx \(kernel\): case '{says}"):
        prove(network, {RNN: build_onnx_rnn(network)})
