"""Reads the weights of a recurrent network from its standard ONNX form."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from unroll_engine.kernel.onnx_file import array_of, parse, require, short
from unroll_engine.kernel.weights import Cell, LayerWeights, NetworkWeights, UnsupportedNetworkError
from unroll_engine.models.spec import Float32Array
from unroll_proto.onnx.onnx_pb2 import AttributeProto, GraphProto, NodeProto, TensorProto

_CELLS: dict[tuple[str, tuple[bytes, ...]], Cell] = {
    ("RNN", (b"Tanh",)): "rnn_tanh",
    ("RNN", (b"Relu",)): "rnn_relu",
    ("LSTM", (b"Sigmoid", b"Tanh", b"Tanh")): "lstm",
    ("GRU", (b"Sigmoid", b"Tanh")): "gru_reset_before",
}
_DEFAULT_ACTIVATIONS = dict(reversed(_CELLS))
# Positions of the kernel's gates among ONNX's: LSTM i, o, f, c; GRU z, r, h.
_GATES = {"RNN": (0,), "LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2)}
_UNUSED_INPUTS = {"sequence_lens": 4, "P": 7}
_INT = AttributeProto.INT, "i"
# Types of the attributes, and the fields with their values.
_ATTRIBUTES = {
    "activations": (AttributeProto.STRINGS, "strings"),
    "axis": _INT,
    "direction": (AttributeProto.STRING, "s"),
    "hidden_size": _INT,
    "layout": _INT,
    "linear_before_reset": _INT,
    "perm": (AttributeProto.INTS, "ints"),
}
# Those that operators must have.
_FIXED = {"Concat": {"axis": 0}, "Gather": {"axis": 0}, "Split": {"axis": 0}, "Transpose": {"perm": [1, 0, 2]}}


@dataclass(frozen=True)
class _Sequence:
    """Values of every step: the inputs (layer -1), or the states of a layer."""

    layer: int
    mean: Float32Array | None = None
    std: Float32Array | None = None


@dataclass(frozen=True)
class _State:
    """A state tensor among the graph's inputs, or one layer's part of it."""

    name: str
    layer: int | None = None


@dataclass(frozen=True)
class _Final:
    """Layers of a state tensor (by number) after the last step."""

    tensor: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class _Readout:
    """Logits of the last layer's states: weight [hidden_size, output_size]."""

    weight: Float32Array
    bias: Float32Array | None = None


_Value = NDArray[Any] | _Sequence | _State | _Final | _Readout


def read_onnx(content: bytes) -> NetworkWeights:
    """Reads a network from a model with the operators RNN, LSTM or GRU.

    The graph is [Sub, Div] -> layers of one kind -> MatMul, [Add], as `unroll-export` writes it. Its inputs are values,
    then state tensors, each [num_layers, batch, hidden_size]. Its outputs are logits and states of every step, then
    the state tensors after the last.

    Raises:
        UnsupportedNetworkError: the graph differs; the message names the node and the reason.
    """
    return _Reader(parse(content)).network()


class _Reader:
    """Walks a graph once and gives every value a meaning."""

    def __init__(self, graph: GraphProto) -> None:
        self._graph = graph
        self._values: dict[str, _Value] = {}
        self._cells: list[Cell] = []
        self._layers: list[LayerWeights] = []
        self._states: list[tuple[_State, ...]] = []
        self._scale: tuple[Float32Array, Float32Array] | None = None
        self._node = NodeProto()

    def network(self) -> NetworkWeights:
        for tensor in self._graph.initializer:
            require(tensor.name not in self._values, f"tensor {short(tensor.name)}: there are two")
            self._values[tensor.name] = array_of(tensor)
        inputs = [value.name for value in self._graph.input]
        require(bool(inputs), "the graph has no inputs")
        require(not self._values.keys() & inputs, "an input has the name of a tensor")
        require(len(set(inputs)) == len(inputs), "two inputs have one name")
        for value in (*self._graph.input, *self._graph.output):
            require(
                value.type.tensor_type.elem_type == TensorProto.FLOAT, f"{short(value.name)}: float32 tensor expected"
            )
        self._values[inputs[0]] = _Sequence(-1)
        self._values |= {name: _State(name) for name in inputs[1:]}
        for node in self._graph.node:
            self._node = node
            read = self._OPERATORS.get(node.op_type) if not node.domain else None
            if read is None:
                self._refuse("no such operator in the kernel")
            expected = _FIXED.get(node.op_type, {})
            if node.op_type not in _GATES and (found := self._attributes()) != expected:
                self._refuse(f"attributes {expected} expected, got {found}")
            results = read(self)
            self._values |= {name: value for name, value in zip(node.output, results, strict=False) if name}
        return self._result(inputs[1:])

    def _result(self, state_inputs: list[str]) -> NetworkWeights:
        layers, cells = len(self._layers), set(self._cells)
        if len(cells) != 1:
            raise UnsupportedNetworkError(f"layers of one kind expected, found {sorted(cells) or 'none'}")
        outputs = [self._values.get(output.name) for output in self._graph.output]
        readout = outputs[0] if outputs else None
        finals = [_Final(tensor, tuple(range(layers))) for tensor in range(len(state_inputs))]
        known = all(isinstance(value, _Sequence | _Final) for value in outputs[1:])
        if not (isinstance(readout, _Readout) and known and outputs[1:] == [_Sequence(layers - 1), *finals]):
            raise UnsupportedNetworkError("outputs: logits and states of every step, then the final states, expected")
        for layer, states in enumerate(self._states):
            whole = [_State(name, layer) for name in state_inputs]
            given = [state if state.layer is not None or layers > 1 else _State(state.name, 0) for state in states]
            if given != whole:
                raise UnsupportedNetworkError(f"layer {layer}: its initial state is not its part of the state inputs")
        if self._scale is not None:
            require(bool((self._scale[1] > 0).all()), "std: has values that are not positive")
        bias = readout.bias if readout.bias is not None else np.zeros(readout.weight.shape[1], np.float32)
        return NetworkWeights(
            self._cells[0], self._scale, tuple(self._layers), np.ascontiguousarray(readout.weight.T), bias
        )

    def _scale_inputs(self) -> list[_Value]:
        sequence, array = self._inputs(_Sequence, np.ndarray)
        name = "mean" if self._node.op_type == "Sub" else "std"
        if sequence.layer >= 0 or sequence.std is not None or getattr(sequence, name) is not None:
            self._refuse("only inputs can be centred, once, and then scaled, once")
        return [replace(sequence, **{name: array})]

    def _transpose(self) -> list[_Value]:
        return self._inputs(_Sequence)

    def _same(self) -> list[_Value]:
        return [self._values[self._node.input[0]]]

    def _squeeze(self) -> list[_Value]:
        sequence, axes = self._inputs(_Sequence, np.ndarray)
        if axes.tolist() != [1]:
            self._refuse("only the axis of directions can be squeezed")
        return [sequence]

    def _unsqueeze(self) -> list[_Value]:
        value, axes = self._inputs((_State, _Final), np.ndarray)
        if axes.tolist() != [0]:
            self._refuse("only an axis of layers can be added")
        return [value]

    def _split(self) -> list[_Value]:
        state, sizes = self._inputs(_State, np.ndarray)
        if state.layer is not None or set(sizes.tolist()) != {1}:
            self._refuse("only a state can be split, by layers")
        return [_State(state.name, layer) for layer in range(len(sizes))]

    def _gather(self) -> list[_Value]:
        state, index = self._inputs(_State, np.ndarray)
        if state.layer is not None or index.size != 1:
            self._refuse("only a layer of a state can be picked")
        return [_State(state.name, int(index.item()))]

    def _concat(self) -> list[_Value]:
        finals = self._inputs(*[_Final] * len(self._node.input))
        if len({final.tensor for final in finals}) != 1:
            self._refuse("only layers of one final state can be joined")
        return [_Final(finals[0].tensor, tuple(layer for final in finals for layer in final.layers))]

    def _multiply(self) -> list[_Value]:
        sequence, weight = self._inputs(_Sequence, np.ndarray)
        if sequence.layer < 0 or sequence.layer != len(self._layers) - 1 or weight.ndim != 2:
            self._refuse("only the last layer's states can be read out")
        if weight.shape[0] != self._layers[-1].recurrent.shape[1]:
            self._refuse(f"weights of shape [hidden_size, output_size] expected, got {list(weight.shape)}")
        return [_Readout(self._float32(weight))]

    def _add(self) -> list[_Value]:
        readout, bias = self._inputs(_Readout, np.ndarray)
        if readout.bias is not None or bias.shape != readout.weight.shape[1:]:
            self._refuse("only one bias, [output_size], can be added to logits")
        return [_Readout(readout.weight, self._float32(bias))]

    def _recur(self) -> list[_Value]:
        node, operator, layer = self._node, self._node.op_type, len(self._layers)
        for name, position in _UNUSED_INPUTS.items():
            if len(node.input) > position and node.input[position]:
                self._refuse(f"input {name} is not supported")
        tensors = 2 if operator == "LSTM" else 1
        sequence, w, r, b, *states = self._inputs(
            _Sequence, np.ndarray, np.ndarray, np.ndarray, None, *[_State] * tensors
        )
        if sequence.layer != layer - 1:
            self._refuse("layers must stand one upon the other")
        if layer == 0 and (sequence.mean is not None or sequence.std is not None):
            width = w.shape[-1]
            mean = np.zeros(width, np.float32) if sequence.mean is None else self._float32(sequence.mean)
            std = np.ones(width, np.float32) if sequence.std is None else self._float32(sequence.std)
            if mean.shape != (width,) or std.shape != (width,):
                self._refuse(f"mean and std of shape [{width}] expected")
            self._scale = mean, std
        cell, weights = self._weights(operator, w, r, b)
        self._cells.append(cell)
        self._layers.append(weights)
        self._states.append(tuple(states))
        return [_Sequence(layer), *(_Final(tensor, (layer,)) for tensor in range(tensors))]

    def _weights(self, operator: str, w: NDArray[Any], r: NDArray[Any], b: NDArray[Any]) -> tuple[Cell, LayerWeights]:
        found = self._attributes()
        activations = tuple(found.pop("activations", ())) or _DEFAULT_ACTIVATIONS[operator]
        reset_after = bool(found.pop("linear_before_reset", 0))
        hidden = found.pop("hidden_size", r.shape[-1])
        direction, layout = found.pop("direction", b"forward"), found.pop("layout", 0)
        cell = _CELLS.get((operator, activations))
        if cell is None:
            self._refuse(f"activations {[str(name, 'utf-8', 'replace') for name in activations]} are not supported")
        if found or direction != b"forward" or layout:
            self._refuse(f"attributes {sorted(found) or 'direction or layout'} are not supported")
        gates = len(_GATES[operator])
        width = self._layers[-1].recurrent.shape[1] if self._layers else w.shape[-1]
        shapes = (1, gates * hidden, width), (1, gates * hidden, hidden), (1, 2 * gates * hidden)
        if tuple(array.shape for array in (w, r, b)) != shapes:
            self._refuse(f"weights of shapes {list(shapes)} expected")
        order = list(_GATES[operator])
        input_, recurrent = (
            self._float32(array).reshape(gates, hidden, -1)[order].reshape(gates * hidden, -1) for array in (w, r)
        )
        of_input, of_state = self._float32(b).reshape(2, gates, hidden)[:, order]
        bias = of_input + of_state
        if operator == "GRU" and reset_after:
            # The reset gate multiplies the recurrent product with its bias, so that bias stays apart.
            cell, bias = "gru", np.stack([bias[0], bias[1], of_input[2], of_state[2]])
        return cell, LayerWeights(input_, recurrent, bias.ravel())

    def _inputs(self, *kinds: Any) -> list[Any]:
        """Returns the values of the node's inputs, each of the expected kind; None stands for an omitted input."""
        node, values = self._node, []
        if len(node.input) != len(kinds):
            self._refuse(f"{len(kinds)} inputs expected, got {len(node.input)}")
        for name, kind in zip(node.input, kinds, strict=True):
            if kind is None:
                continue
            value = self._values.get(name)
            if not isinstance(value, kind):
                self._refuse(f"input {name!r} is not what the kernel expects there")
            values.append(value)
        return values

    def _attributes(self) -> dict[str, Any]:
        attributes = self._node.attribute
        if unknown := [str(each.name) for each in attributes if _ATTRIBUTES.get(each.name, ("",))[0] != each.type]:
            self._refuse(f"attributes {sorted(unknown)} are not supported")
        values = {each.name: getattr(each, _ATTRIBUTES[each.name][1]) for each in attributes}
        return {name: value if isinstance(value, int | bytes) else list(value) for name, value in values.items()}

    def _float32(self, array: NDArray[Any]) -> Float32Array:
        if array.dtype != np.float32:
            self._refuse(f"float32 weights expected, got {array.dtype}")
        return array

    def _refuse(self, problem: str) -> NoReturn:
        operator = f"{self._node.domain}.{self._node.op_type}".removeprefix(".")
        raise UnsupportedNetworkError(f"node {short(self._node.name)} ({operator[:100]}): {problem}")

    _OPERATORS: ClassVar[dict[str, Callable[["_Reader"], list[_Value]]]] = {
        "Sub": _scale_inputs,
        "Div": _scale_inputs,
        "Transpose": _transpose,
        "Identity": _same,
        "Squeeze": _squeeze,
        "Unsqueeze": _unsqueeze,
        "Split": _split,
        "Gather": _gather,
        "Concat": _concat,
        "MatMul": _multiply,
        "Add": _add,
        "RNN": _recur,
        "LSTM": _recur,
        "GRU": _recur,
    }
