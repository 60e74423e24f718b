"""The form of a step graph in which every convolution over time, and every recurrent node, is a product of matrices.

ONNX Runtime convolves the sequences of a batch one after the other. As a product the rows of all are computed at once.
Windows are cut out of [batch, time, channels], in which each is one piece of memory.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from unroll_export.steps.cells import GATES, STATES, CellWriter, attributes_of
from unroll_export.steps.folding import add_constant
from unroll_export.steps.plan import Plan
from unroll_export.steps.sequences import drop_unused
from unroll_export.steps.specializing import Arrays, specialize
from unroll_export.weight_files import ImportRefusedError

_UNARY = frozenset({"Abs", "Cast", "Exp", "Identity", "Log", "Neg", "Relu", "Sigmoid", "Softplus", "Sqrt", "Tanh"})
_BINARY = frozenset({"Add", "Div", "Mul", "Pow", "Sub"})
_TURNED_AXES = {1: 2, 2: 1, -2: 2, -1: 1}


def to_matmul(model: ModelProto, plan: Plan) -> ModelProto:
    """Makes the form of a step graph; the graph itself is not changed.

    Raises:
        ImportRefusedError: it has no convolution or recurrent node that could be a product.
    """
    made = ModelProto()
    made.CopyFrom(model)
    writer = _Writer(made, specialize(made, plan))
    writer.rewrite()
    if not writer.products:
        raise ImportRefusedError("--form matmul: the graph has no convolution over time and no recurrent node")
    drop_unused(made)
    return made


class _Writer:
    """Rewrites the nodes of a graph, in order.

    Args:
        model: The graph, without branches.
        values: Its values in a run, by name.

    Attributes:
        products: Nodes that became products.
    """

    def __init__(self, model: ModelProto, values: Arrays) -> None:
        self.products = 0
        self._graph = model.graph
        self._values = values
        self._constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        # Values [batch, channels, time] that are there as [batch, time, channels] too.
        self._turned: dict[str, str] = {}
        self._nodes: list[NodeProto] = []

    def rewrite(self) -> None:
        """Rewrites the graph."""
        for node in list(self._graph.node):
            if node.op_type == "Conv" and self._convolve(node):
                self.products += 1
                continue
            if node.op_type in GATES and self._recur(node):
                self.products += 1
                continue
            self._turn(node)
            self._nodes.append(node)
        nodes = [NodeProto() for _ in self._nodes]
        for copy, node in zip(nodes, self._nodes, strict=True):
            copy.CopyFrom(node)
        del self._graph.node[:]
        self._graph.node.extend(nodes)

    def _convolve(self, node: NodeProto) -> bool:
        """Writes a convolution over one dimension as a product; returns False if it is of another kind."""
        attributes, (x, w, *rest) = attributes_of(node), node.input
        weights = self._constants.get(w)
        bias = self._constants.get(rest[0]) if rest else None
        if weights is None or weights.ndim != 3 or (rest and bias is None) or x not in self._values:
            return False
        plain = attributes.get("group", 1) == 1 and set(attributes.get("dilations", [1])) == {1}
        if not plain or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
            return False
        outputs, channels, width = weights.shape
        length, stride = self._values[x].shape[2], attributes.get("strides", [1])[0]
        before, after = attributes.get("pads", [0, 0])
        steps = (length + before + after - width) // stride + 1
        rows = self._node("Reshape", self._as_turned(x), self._ints(-1, length * channels))
        if before or after:
            rows = self._node("Pad", rows, self._ints(0, before * channels, 0, after * channels))
        begins = [step * stride * channels for step in range(steps)]
        windows = [
            self._node("Slice", rows, self._ints(begin), self._ints(begin + width * channels), self._ints(1))
            for begin in begins
        ]
        joined = windows[0]
        if steps > 1:
            together = self._node("Concat", *windows, axis=1)
            joined = self._node("Reshape", together, self._ints(-1, width * channels))
        matrix = np.ascontiguousarray(weights.transpose(2, 1, 0).reshape(width * channels, outputs))
        product = self._node("MatMul", joined, self._constant(matrix))
        if bias is not None:
            product = self._node("Add", product, self._constant(bias))
        turned = self._node("Reshape", product, self._ints(-1, steps, outputs))
        self._nodes.append(helper.make_node("Transpose", [turned], [node.output[0]], perm=[0, 2, 1]))
        self._turned[node.output[0]] = turned
        return True

    def _recur(self, node: NodeProto) -> bool:
        """Writes a recurrent node as products; returns False if it runs more than a step, or can't be written."""
        states = STATES[node.op_type]
        inputs = [*node.input, *[""] * 8][:8]
        begun = inputs[5 : 5 + len(states)]
        forward = attributes_of(node).get("direction", b"forward") == b"forward"
        one_step = inputs[0] in self._values and self._values[inputs[0]].shape[0] == 1
        if not (all(begun) and forward and one_step) or inputs[4]:
            return False
        prefix = f"matmul_{node.op_type.lower()}{len(self._nodes)}"
        outputs = [*node.output, "", ""]
        after = [outputs[1 + index] or f"{prefix}_{state}" for index, state in enumerate(states)]
        plain = NodeProto()
        plain.CopyFrom(node)
        plain.output[:] = node.output[:1]
        cell = CellWriter(prefix)
        if not cell.write(plain, self._constants, begun, after):
            return False
        self._nodes += cell.nodes
        self._graph.initializer.extend(cell.tensors)
        return True

    def _turn(self, node: NodeProto) -> None:
        """Writes a node on turned values beside itself, where that is the same; the one not needed is dropped."""
        turned = [self._turned.get(name) for name in node.input]
        if not turned or turned[0] is None:
            return
        first: str = turned[0]
        if node.op_type in _UNARY and len(node.input) == 1:
            self._turned[node.output[0]] = self._node(node.op_type, first, **attributes_of(node))
        elif node.op_type in _BINARY:
            other = turned[1] or (node.input[1] if self._is_number(node.input[1]) else None)
            if other:
                self._turned[node.output[0]] = self._node(node.op_type, first, other)
        elif node.op_type == "Slice" and len(node.input) > 3:
            axes = self._constants.get(node.input[3], np.empty(0)).reshape(-1).tolist()
            if len(axes) == 1 and axes[0] in _TURNED_AXES:
                bounds = [*node.input[1:3], self._ints(_TURNED_AXES[axes[0]]), *node.input[4:]]
                self._turned[node.output[0]] = self._node("Slice", first, *bounds)

    def _as_turned(self, name: str) -> str:
        """A value [batch, channels, time] as [batch, time, channels]."""
        if name not in self._turned:
            one = self._values[name].shape[1] == 1
            self._turned[name] = (
                self._node("Reshape", name, self._ints(-1, self._values[name].shape[2], 1))
                if one
                else self._node("Transpose", name, perm=[0, 2, 1])
            )
        return self._turned[name]

    def _is_number(self, name: str) -> bool:
        return name in self._constants and self._constants[name].size == 1

    def _node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        to = f"matmul_{operator.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [to], **attributes))
        return to

    def _ints(self, *values: int) -> str:
        return self._constant(np.array(values, np.int64))

    def _constant(self, value: NDArray[Any]) -> str:
        name = add_constant(self._graph, f"matmul_constant_{len(self._graph.initializer)}", value)
        self._constants[name] = value
        return name
