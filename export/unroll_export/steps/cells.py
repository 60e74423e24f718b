"""One timestep of ONNX's recurrent operators, as products with constant weights.

The operators pack their weights anew in every run, and take another kernel for a few rows, so that bits depend on the
batch. A product with a constant on its right adds every row in one order.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
"""Recurrent operators, and the gates of their weights: of GRU z, r, h, of LSTM i, o, f, c."""
STATES = {"RNN": "h", "GRU": "h", "LSTM": "hc"}
"""Names of their states, in the order of inputs and outputs."""
_ACTIVATIONS = {"RNN": [b"Tanh"], "GRU": [b"Sigmoid", b"Tanh"], "LSTM": [b"Sigmoid", b"Tanh", b"Tanh"]}
_PLAIN = {b"Sigmoid", b"Tanh", b"Relu", b"Softsign", b"Softplus"}
"""Activations without parameters, which are operators by themselves."""
_KNOWN = {"hidden_size", "direction", "activations", "linear_before_reset", "layout"}


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Returns the attributes of a node by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


class CellWriter:
    """Writes the step of a recurrent node as other nodes.

    Args:
        prefix: Begin of the names of all values.

    Attributes:
        nodes: The nodes, in order.
        tensors: Their constants.
    """

    def __init__(self, prefix: str) -> None:
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        self._prefix = prefix
        self._hidden = 0

    def write(self, node: NodeProto, weights: Mapping[str, NDArray[Any]], states: list[str], after: list[str]) -> bool:
        """Writes a step; returns False, with nothing written, if the node has what this can't express.

        Args:
            node: The recurrent node; its first input is [1, batch, features].
            weights: Constants by name.
            states: Its states before the step, [1, batch, hidden_size] each.
            after: Names of its states after the step.
        """
        attributes, operator = attributes_of(node), node.op_type
        inputs = [*node.input, *[""] * 8][:8]
        activations = attributes.get("activations") or _ACTIVATIONS[operator]
        plain = attributes.keys() <= _KNOWN and set(activations) <= _PLAIN and not inputs[7]
        if not plain or not all(name in weights for name in inputs[1:3]) or (inputs[3] and inputs[3] not in weights):
            return False
        gates = GATES[operator]
        of_input, of_state = (weights[name][0] for name in inputs[1:3])
        self._hidden = hidden = of_state.shape[1]
        bias = weights[inputs[3]][0] if inputs[3] else np.zeros(2 * gates * hidden, np.float32)
        x = self._rows(node.input[0], of_input.shape[1])
        before = [self._rows(name, hidden) for name in states]
        functions = [name.decode() for name in activations]
        drive = self._product(x, of_input.T, "drive")
        if operator == "GRU":
            last = [self._gru(drive, before[0], of_state, bias, functions, attributes.get("linear_before_reset", 0))]
        else:
            total = self._node("Add", drive, self._product(before[0], of_state.T, "recurrent"))
            total = self._node("Add", total, self._constant(bias[: gates * hidden] + bias[gates * hidden :]))
            last = [self._node(functions[0], total)] if operator == "RNN" else self._lstm(total, before[1], functions)
        outputs = [*node.output, "", ""]
        if outputs[0]:
            self._reshape(last[0], [1, 1, -1, hidden], outputs[0])
        for value, name, of_node in zip(last, after, outputs[1:], strict=False):
            self._reshape(value, [1, -1, hidden], name)
            if of_node:
                self.nodes.append(helper.make_node("Identity", [name], [of_node]))
        return True

    def _lstm(self, total: str, c: str, functions: list[str]) -> list[str]:
        i, o, f, g = (self._gate(total, gate) for gate in range(4))
        kept = self._node("Mul", self._node(functions[0], f), c)
        new = self._node("Mul", self._node(functions[0], i), self._node(functions[1], g))
        c = self._node("Add", kept, new)
        return [self._node("Mul", self._node(functions[0], o), self._node(functions[2], c)), c]

    def _gru(
        self,
        drive: str,
        h: str,
        of_state: NDArray[Any],
        bias: NDArray[Any],
        functions: list[str],
        reset_after: int,
    ) -> str:
        hidden = self._hidden
        of_input_bias, of_state_bias = bias.reshape(2, 3 * hidden)
        # The bias of the new state's product stays apart: the reset gate may multiply it.
        joined = of_input_bias + of_state_bias
        joined[2 * hidden :] = of_input_bias[2 * hidden :]
        drive = self._node("Add", drive, self._constant(joined))
        gates = self._product(h, of_state[: 2 * hidden].T, "gates")
        z, r = (
            self._node(functions[0], self._node("Add", self._gate(drive, gate), self._gate(gates, gate)))
            for gate in range(2)
        )
        last_bias = self._constant(of_state_bias[2 * hidden :])
        weights = of_state[2 * hidden :].T
        if reset_after:
            reset = self._node("Mul", r, self._node("Add", self._product(h, weights, "new"), last_bias))
        else:
            reset = self._node("Add", self._product(self._node("Mul", r, h), weights, "new"), last_bias)
        new = self._node(functions[1], self._node("Add", self._gate(drive, 2), reset))
        # (1 - z) new + z h, as new + z (h - new).
        return self._node("Add", new, self._node("Mul", z, self._node("Sub", h, new)))

    def _product(self, value: str, weights: NDArray[Any], name: str) -> str:
        return self._node("MatMul", value, self._constant(np.ascontiguousarray(weights), name))

    def _gate(self, value: str, gate: int) -> str:
        bounds = [gate * self._hidden, (gate + 1) * self._hidden, 1]
        return self._node("Slice", value, *(self._constant(np.array([bound], np.int64)) for bound in bounds))

    def _rows(self, value: str, width: int) -> str:
        return self._reshape(value, [-1, width])

    def _reshape(self, value: str, shape: list[int], to: str = "") -> str:
        return self._node("Reshape", value, self._constant(np.array(shape, np.int64)), to=to)

    def _node(self, operator: str, *inputs: str, to: str = "") -> str:
        to = to or f"{self._prefix}_{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [to]))
        return to

    def _constant(self, value: NDArray[Any], name: str = "constant") -> str:
        name = f"{self._prefix}_{name}_{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(value, name))
        return name
