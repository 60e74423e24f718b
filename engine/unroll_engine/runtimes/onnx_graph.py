"""Checks that an ONNX graph is one of the exporter's. The only file that imports onnx.

The sizes in a manifest determine all of a graph except the values of its weights: its nodes, their attributes, the body
of each Scan, and every tensor's type and shape. So a graph is compared with the one expected. That leaves an untrusted
bundle nothing to vary: no other operator, no data outside the file, no sizes that explode when the graph is run.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from unroll_engine.models.spec import ModelSpec
from unroll_proto.bundle import BundleError

OPSET = 17
IR_VERSION = 8

_ITEM_BYTES = {TensorProto.FLOAT: 4, TensorProto.INT64: 8}
_Shape = tuple[int | str, ...]


@dataclass
class _Graph:
    """The expected graph.

    Attributes:
        nodes: Operator, inputs, outputs and attributes of each; the attribute `body` is a graph.
        weights: Shapes of the float32 initializers.
        integers: Shapes and values of the int64 initializers.
        inputs: Shapes of the float32 inputs, in order; a name stands for a dynamic size.
        outputs: Likewise.
    """

    inputs: dict[str, _Shape]
    outputs: dict[str, _Shape]
    nodes: list[tuple[str, Sequence[str], Sequence[str], dict[str, Any]]] = field(default_factory=list)
    weights: dict[str, _Shape] = field(default_factory=dict)
    integers: dict[str, tuple[_Shape, list[int]]] = field(default_factory=dict)

    def node(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        self.nodes.append((operator, inputs, outputs, attributes))


def check_scan(content: bytes, spec: ModelSpec) -> None:
    """Raises BundleError if `content` is not the Scan form, `model.scan.onnx`, of such a model."""
    _check(content, _scan_form(spec), "model.scan.onnx")


def check_rnn(content: bytes, spec: ModelSpec) -> None:
    """Raises BundleError if `content` is not the form with the RNN operator, `model.onnx`, of such a model."""
    _check(content, _rnn_form(spec), "model.onnx")


def _scan_form(spec: ModelSpec) -> _Graph:
    graph, layers, hidden = _outline(spec, ("time", "batch")), spec.num_layers, spec.hidden_size
    graph.weights["one"] = (1,)
    graph.integers |= {"pads": ((6,), [0, 0, 0, 0, 0, 1]), "layer_axis": ((1,), [0])}
    steps = "standardized"
    final = ["final_state"] if layers == 1 else [f"final_state_l{layer}" for layer in range(layers)]
    for layer, width in _layers(spec):
        states = "states" if layer == layers - 1 else f"states_l{layer}"
        projection, recurrence = f"rnn.weight_and_bias_ih_l{layer}", f"rnn.weight_hh_l{layer}"
        graph.weights |= {projection: (width + 1, hidden), recurrence: (hidden, hidden)}
        graph.integers[f"index_l{layer}"] = ((), [layer])
        graph.node("Pad", [steps, "pads", "one"], [f"with_one_l{layer}"])
        graph.node("MatMul", [f"with_one_l{layer}", projection], [f"drive_l{layer}"])
        graph.node("Gather", ["initial_state", f"index_l{layer}"], [f"initial_state_l{layer}"], axis=0)
        shape: _Shape = ("batch", hidden)
        body = _Graph(
            inputs={f"h_l{layer}": shape, f"drive_t_l{layer}": shape},
            outputs={f"h_next_l{layer}": shape, f"state_l{layer}": shape},
        )
        body.node("MatMul", [f"h_l{layer}", recurrence], [f"recurrent_l{layer}"])
        body.node("Add", [f"recurrent_l{layer}", f"drive_t_l{layer}"], [f"activation_l{layer}"])
        body.node("Tanh", [f"activation_l{layer}"], [f"h_next_l{layer}"])
        body.node("Identity", [f"h_next_l{layer}"], [f"state_l{layer}"])
        ends = [f"h_last_l{layer}", states]
        graph.node("Scan", [f"initial_state_l{layer}", f"drive_l{layer}"], ends, body=body, num_scan_inputs=1)
        graph.node("Unsqueeze", [f"h_last_l{layer}", "layer_axis"], [final[layer]])
        steps = states
    if layers > 1:
        graph.node("Concat", final, ["final_state"], axis=0)
    _add_readout(graph, spec)
    return graph


def _rnn_form(spec: ModelSpec) -> _Graph:
    graph, layers, hidden = _outline(spec, ("batch", "time")), spec.num_layers, spec.hidden_size
    graph.integers["directions_axis"] = ((1,), [1])
    graph.node("Transpose", ["standardized"], ["steps"], perm=[1, 0, 2])
    initial, final, steps = ["initial_state"], ["final_state"], "steps"
    if layers > 1:
        initial = [f"initial_state_l{layer}" for layer in range(layers)]
        final = [f"final_state_l{layer}" for layer in range(layers)]
        graph.integers["one_each"] = ((layers,), [1] * layers)
        graph.node("Split", ["initial_state", "one_each"], initial, axis=0)
    for layer, width in _layers(spec):
        weights = [f"rnn.weight_ih_l{layer}", f"rnn.weight_hh_l{layer}", f"rnn.bias_l{layer}"]
        shapes = [(1, hidden, width), (1, hidden, hidden), (1, 2 * hidden)]
        graph.weights |= dict(zip(weights, shapes, strict=True))
        inputs = [steps, *weights, "", initial[layer]]
        outputs = [f"directions_l{layer}", final[layer]]
        graph.node("RNN", inputs, outputs, hidden_size=hidden, activations=[b"Tanh"])
        steps = f"states_l{layer}"
        graph.node("Squeeze", [f"directions_l{layer}", "directions_axis"], [steps])
    if layers > 1:
        graph.node("Concat", final, ["final_state"], axis=0)
    graph.node("Transpose", [steps], ["states"], perm=[1, 0, 2])
    _add_readout(graph, spec)
    return graph


def _outline(spec: ModelSpec, lead: tuple[str, str]) -> _Graph:
    """Inputs, outputs and the standardization."""
    states: _Shape = (spec.num_layers, "batch", spec.hidden_size)
    graph = _Graph(
        inputs={"input": (*lead, spec.input_size), "initial_state": states},
        outputs={
            "logits": (*lead, spec.output_size),
            "states": (*lead, spec.hidden_size),
            "final_state": states,
        },
    )
    graph.weights |= {"mean": (spec.input_size,), "std": (spec.input_size,)}
    graph.node("Sub", ["input", "mean"], ["centred"])
    graph.node("Div", ["centred", "std"], ["standardized"])
    return graph


def _add_readout(graph: _Graph, spec: ModelSpec) -> None:
    graph.weights |= {"fc.weight": (spec.hidden_size, spec.output_size), "fc.bias": (spec.output_size,)}
    graph.node("MatMul", ["states", "fc.weight"], ["readout"])
    graph.node("Add", ["readout", "fc.bias"], ["logits"])


def _layers(spec: ModelSpec) -> Iterator[tuple[int, int]]:
    """Number and input width of every layer."""
    return ((layer, spec.hidden_size if layer else spec.input_size) for layer in range(spec.num_layers))


def _check(content: bytes, expected: _Graph, file: str) -> None:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        raise BundleError(f"{file}: not ONNX") from None
    opsets = [(opset.domain, opset.version) for opset in model.opset_import]
    _require(opsets == [("", OPSET)], file, f"operator sets {_short(opsets)}, version {OPSET} of ONNX's own expected")
    _require(model.ir_version == IR_VERSION, file, f"IR version {model.ir_version}, {IR_VERSION} expected")
    _require(not model.functions, file, "has functions of its own")
    _require(not model.training_info, file, "has training graphs")
    _check_graph(model.graph, expected, file)


def _check_graph(graph: onnx.GraphProto, expected: _Graph, file: str) -> None:
    _check_nodes(graph.node, expected, file)
    for kind in ("sparse_initializer", "value_info", "quantization_annotation"):
        _require(not getattr(graph, kind), file, f"has {kind}, which no exported graph has")
    for values, shapes in ((graph.input, expected.inputs), (graph.output, expected.outputs)):
        found = {value.name: _shape_of(value) for value in values}
        same = list(found.items()) == list(shapes.items()) and len(values) == len(shapes)
        _require(same, file, f"takes or gives {_short(found)}, {shapes} expected")
    names = [tensor.name for tensor in graph.initializer]
    wanted = {*expected.weights, *expected.integers}
    surplus = sorted({*names} ^ wanted)
    _require(not surplus, file, f"missing or surplus tensors: {_short(surplus)}")
    _require(len(names) == len(wanted), file, "has tensors of the same name")
    for tensor in graph.initializer:
        _check_tensor(tensor, expected, file)


def _check_nodes(nodes: Sequence[onnx.NodeProto], expected: _Graph, file: str) -> None:
    operators = {operator for operator, *_ in expected.nodes}
    for index, (node, wanted) in enumerate(zip_longest(nodes, expected.nodes)):
        place = f"node {index}"
        if node is None:
            _require(False, file, f"ends before {place}, {wanted[0]}")
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        allowed = name in operators
        _require(allowed, file, f"{place} is {_short(name)}; allowed are {', '.join(sorted(operators))}")
        _require(wanted is not None, file, f"{place}, {name}, is one too many")
        operator, inputs, outputs, attributes = wanted
        same = name == operator and list(node.input) == [*inputs] and list(node.output) == [*outputs]
        _require(same, file, f"{place} is not {operator}({', '.join(inputs)})")
        found = {attribute.name: attribute for attribute in node.attribute}
        same = found.keys() == attributes.keys() and len(node.attribute) == len(attributes)
        _require(same, file, f"{place}, {name}: attributes {_short(sorted(found))}, {sorted(attributes)} expected")
        for key, value in attributes.items():
            _check_attribute(found[key], value, file, f"{place}, {name}")


def _check_attribute(attribute: onnx.AttributeProto, expected: Any, file: str, place: str) -> None:
    if isinstance(expected, _Graph):
        _require(attribute.type == onnx.AttributeProto.GRAPH, file, f"{place}: {attribute.name} is no graph")
        _check_graph(attribute.g, expected, file)
        return
    kinds = {onnx.AttributeProto.INT, onnx.AttributeProto.INTS, onnx.AttributeProto.STRINGS}
    known = attribute.type in kinds and not attribute.ref_attr_name
    same = known and onnx.helper.get_attribute_value(attribute) == expected
    _require(same, file, f"{place}: {attribute.name} is not {expected}")


def _check_tensor(tensor: onnx.TensorProto, expected: _Graph, file: str) -> None:
    name = tensor.name
    outside = tensor.data_location == TensorProto.EXTERNAL or tensor.external_data
    _require(not outside, file, f"{name}: its data is outside the file")
    kind = TensorProto.FLOAT if name in expected.weights else TensorProto.INT64
    shape = expected.weights[name] if name in expected.weights else expected.integers[name][0]
    _require(tensor.data_type == kind, file, f"{name}: data type {tensor.data_type}, {kind} expected")
    _require(tuple(tensor.dims) == shape, file, f"{name}: shape {_short(list(tensor.dims))}, {list(shape)} expected")
    size = _ITEM_BYTES[kind] * math.prod(tensor.dims)
    # Of the ways in which ONNX can hold values, the exporter uses one.
    others = [each.name for each, _ in tensor.ListFields() if each.name.endswith("_data") and each.name != "raw_data"]
    held = not others and len(tensor.raw_data) == size and not tensor.HasField("segment")
    _require(held, file, f"{name}: {len(tensor.raw_data)} bytes of raw data, {size} expected and nothing else")
    if name in expected.integers:
        values = np.frombuffer(tensor.raw_data, "<i8").tolist()
        _require(values == expected.integers[name][1], file, f"{name}: not {expected.integers[name][1]}")
    else:
        numbers = np.frombuffer(tensor.raw_data, "<f4")
        _require(bool(np.isfinite(numbers).all()), file, f"{name}: has values that are not finite")
        _require(name != "std" or bool((numbers > 0).all()), file, f"{name}: has values that are not positive")


def _shape_of(value: onnx.ValueInfoProto) -> _Shape | None:
    """Shape of a float32 tensor; None where it is something else."""
    if value.type.WhichOneof("value") != "tensor_type" or value.type.tensor_type.elem_type != TensorProto.FLOAT:
        return None
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_param if dim.HasField("dim_param") else dim.dim_value for dim in dims)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _require(condition: bool, file: str, problem: str) -> None:
    if not condition:
        raise BundleError(f"{file}: {problem}")
