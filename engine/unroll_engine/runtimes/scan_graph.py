"""The Scan form of a network, an ONNX graph in memory: the same bits at every batch size and cut.

Why this form:

- All products have a constant right-hand side, which ONNX Runtime packs once, when the model is loaded. The packed
  kernel sums over the inner dimension in one order for any number of rows, so a row's bits depend on nothing
  beside it. (The recurrent operators pack their weights anew at every step, and take another kernel for one row.)
- The parts without recurrence are done for all steps at once: one product for the input of a layer, one for the logits.
- The bias rides in the input product, as the last row of its matrix against a feature that is always 1. A separate
  Add would go through memory once more; with it a whole run takes a fifth longer at 64 lanes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from unroll_engine.kernel import LayerWeights, NetworkWeights
from unroll_proto.onnx.onnx_pb2 import AttributeProto, GraphProto, ModelProto, OperatorSetIdProto, TensorProto

_OPSET = 17
_IR_VERSION = 8
_Shape = tuple[int | str, ...]


class _Graph:
    """Nodes and initializers of one graph, in order."""

    def __init__(self) -> None:
        self._graph = GraphProto()

    def constant(self, name: str, value: ArrayLike) -> str:
        """Adds an initializer, float32 or int64, and returns its name."""
        array = np.asarray(value)
        kind, dtype = (TensorProto.FLOAT, "<f4") if array.dtype == np.float32 else (TensorProto.INT64, "<i8")
        data = array.astype(dtype, "C", copy=False).tobytes()
        self._graph.initializer.add(name=name, dims=array.shape, data_type=kind, raw_data=data)
        return name

    def node(self, operator: str, inputs: Sequence[str], *outputs: str, **attributes: int | GraphProto) -> str:
        """Adds a node and returns its first output."""
        node = self._graph.node.add(op_type=operator, input=inputs, output=outputs)
        for name, value in attributes.items():
            if isinstance(value, int):
                node.attribute.add(name=name, type=AttributeProto.INT, i=value)
            else:
                node.attribute.add(name=name, type=AttributeProto.GRAPH, g=value)
        return outputs[0]

    def made(self, name: str, inputs: Mapping[str, _Shape], outputs: Mapping[str, _Shape]) -> GraphProto:
        self._graph.name = name
        for values, shapes in ((self._graph.input, inputs), (self._graph.output, outputs)):
            for value, shape in shapes.items():
                tensor = values.add(name=value).type.tensor_type
                tensor.elem_type = TensorProto.FLOAT
                for size in shape:
                    if isinstance(size, int):
                        tensor.shape.dim.add(dim_value=size)
                    else:
                        tensor.shape.dim.add(dim_param=size)
        return self._graph


def build_scan(weights: NetworkWeights) -> bytes:
    """Serializes a network as ONNX with one Scan a layer; equal weights give equal bytes.

    It takes `input` [time, batch, input_size] and `initial_0`, ... [layers, batch, hidden_size], the state tensors. It
    gives `logits` and `states` of every step, and `final_0`, ... as the initial ones.
    """
    graph, layers = _Graph(), len(weights.layers)
    outputs, hidden = weights.readout.shape
    steps = "input"
    if weights.scale is not None:
        graph.node("Sub", ["input", graph.constant("mean", weights.scale[0])], "centred")
        steps = graph.node("Div", ["centred", graph.constant("std", weights.scale[1])], "standardized")
    graph.constant("pads", np.array([0, 0, 0, 0, 0, 1]))
    graph.constant("one", np.float32(1))
    graph.constant("layer_axis", np.array([0]))
    finals: list[list[str]] = [[] for _ in range(weights.state_tensors)]
    for layer, values in enumerate(weights.layers):
        states = "states" if layer == layers - 1 else f"states_l{layer}"
        for tensor, final in enumerate(_add_layer(graph, weights.cell, layer, values, steps, states)):
            finals[tensor].append(final)
        steps = states
    for tensor, parts in enumerate(finals):
        graph.node("Concat", parts, f"final_{tensor}", axis=0)
    graph.node("MatMul", ["states", graph.constant("readout", weights.readout.T)], "product")
    graph.node("Add", ["product", graph.constant("readout_bias", weights.readout_bias)], "logits")
    state: _Shape = (layers, "batch", hidden)
    inputs = {"input": ("time", "batch", weights.layers[0].input.shape[1])}
    results = {"logits": ("time", "batch", outputs), "states": ("time", "batch", hidden)}
    model = ModelProto(
        graph=graph.made(
            "scan",
            inputs | {f"initial_{tensor}": state for tensor in range(len(finals))},
            results | {f"final_{tensor}": state for tensor in range(len(finals))},
        ),
        opset_import=[OperatorSetIdProto(domain="", version=_OPSET)],
        ir_version=_IR_VERSION,
    )
    return model.SerializeToString(deterministic=True)


def _add_layer(graph: _Graph, cell: str, layer: int, values: LayerWeights, steps: str, states: str) -> list[str]:
    """Adds a layer that turns `steps` into `states`; returns the names of its final states, [1, batch, hidden]."""
    hidden = values.recurrent.shape[1]
    tensors = ["h", "c"] if cell == "lstm" else ["h"]
    rows = len(values.input)
    projection = graph.constant(f"input_l{layer}", np.vstack([values.input.T, values.bias[:rows]]))
    padded = graph.node("Pad", [steps, "pads", "one"], f"with_one_l{layer}")
    drive = graph.node("MatMul", [padded, projection], f"drive_l{layer}")
    index = graph.constant(f"index_l{layer}", np.int64(layer))
    initial = [
        graph.node("Gather", [f"initial_{tensor}", index], f"initial_{name}_l{layer}", axis=0)
        for tensor, name in enumerate(tensors)
    ]
    body = _Body(layer)
    after = {
        "rnn_tanh": _rnn_step,
        "rnn_relu": _rnn_step,
        "lstm": _lstm_step,
        "gru": _gru_step,
        "gru_reset_before": _gru_step,
    }[cell](graph, body, cell, values)
    body.node("Identity", [after[0]], body.name("state"))
    lane: _Shape = ("batch", hidden)
    takes: dict[str, _Shape] = {body.name(name): lane for name in tensors}
    takes[body.name("drive")] = ("batch", rows)
    step = body.made(f"step_l{layer}", takes, dict.fromkeys([*after, body.name("state")], lane))
    ends = [f"last_{name}_l{layer}" for name in tensors]
    graph.node("Scan", [*initial, drive], *ends, states, body=step, num_scan_inputs=1)
    return [graph.node("Unsqueeze", [end, "layer_axis"], f"final_{end}") for end in ends]


class _Body(_Graph):
    """The step of one layer. Its names are apart from those outside, as ONNX asks."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self._layer = layer

    def name(self, name: str) -> str:
        return f"{name}_l{self._layer}_step"

    def apply(self, operator: str, inputs: Sequence[str], output: str) -> str:
        return self.node(operator, inputs, self.name(output))

    def split(self, value: str, *parts: str) -> list[str]:
        """Splits [batch, parts * hidden] into equal parts."""
        names = [self.name(part) for part in parts]
        self.node("Split", [value], *names, axis=1)
        return names


def _rnn_step(graph: _Graph, body: _Body, cell: str, values: LayerWeights) -> list[str]:
    recurrent = graph.constant(body.name("weights"), values.recurrent.T)
    product = body.apply("MatMul", [body.name("h"), recurrent], "recurrent")
    total = body.apply("Add", [product, body.name("drive")], "sum")
    return [body.apply("Tanh" if cell == "rnn_tanh" else "Relu", [total], "next_h")]


def _lstm_step(graph: _Graph, body: _Body, cell: str, values: LayerWeights) -> list[str]:
    recurrent = graph.constant(body.name("weights"), values.recurrent.T)
    product = body.apply("MatMul", [body.name("h"), recurrent], "recurrent")
    total = body.apply("Add", [product, body.name("drive")], "sum")
    i, f, g, o = body.split(total, "i_sum", "f_sum", "g_sum", "o_sum")
    kept = body.apply("Mul", [body.apply("Sigmoid", [f], "f"), body.name("c")], "kept")
    new = body.apply("Mul", [body.apply("Sigmoid", [i], "i"), body.apply("Tanh", [g], "g")], "new")
    c = body.apply("Add", [kept, new], "next_c")
    h = body.apply("Mul", [body.apply("Sigmoid", [o], "o"), body.apply("Tanh", [c], "tanh_c")], "next_h")
    return [h, c]


def _gru_step(graph: _Graph, body: _Body, cell: str, values: LayerWeights) -> list[str]:
    hidden, h = values.recurrent.shape[1], body.name("h")
    gates = graph.constant(body.name("gate_weights"), values.recurrent[: 2 * hidden].T)
    weights = graph.constant(body.name("new_weights"), values.recurrent[2 * hidden :].T)
    *drive, drive_n = body.split(body.name("drive"), "drive_r", "drive_z", "drive_n")
    product = body.split(body.apply("MatMul", [h, gates], "recurrent"), "recurrent_r", "recurrent_z")
    r, z = (
        body.apply("Sigmoid", [body.apply("Add", [one, two], f"{gate}_sum")], gate)
        for gate, one, two in zip("rz", product, drive, strict=True)
    )
    if cell == "gru":
        bias = graph.constant(body.name("new_bias"), values.bias[3 * hidden :])
        of_state = body.apply("Add", [body.apply("MatMul", [h, weights], "recurrent_n"), bias], "biased_n")
        from_state = body.apply("Mul", [r, of_state], "reset_n")
    else:
        from_state = body.apply("MatMul", [body.apply("Mul", [r, h], "reset_h"), weights], "recurrent_n")
    n = body.apply("Tanh", [body.apply("Add", [drive_n, from_state], "n_sum")], "n")
    moved = body.apply("Mul", [z, body.apply("Sub", [h, n], "way")], "moved")
    return [body.apply("Add", [n, moved], "next_h")]
