"""`model.onnx`: a recurrent classifier as the standard ONNX operators, batch-major, for any runtime."""

from typing import Any

import torch
from torch import Tensor, nn

from unroll_export.graphs.onnx_graph import GraphBuilder, serialize
from unroll_export.graphs.tensors import INPUT, LOGITS, STATES, input_shapes, output_shapes, state_names
from unroll_export.model import RecurrentClassifier

_DOC = (
    "{}: standardization, {} operators, linear readout of every step. Batch-major: input and "
    "states are [batch, time, ...], initial and final states are [layers, batch, hidden]."
)
_KINDS = {"simple_rnn": "Elman network", "simple_lstm": "Long short-term memory", "simple_gru": "Gated recurrent units"}
# Positions of ONNX's gates among PyTorch's: i, f, g, o of an LSTM, r, z, n of a GRU.
_GATES = {"RNN": (0,), "LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}


def build_onnx_rnn(model: RecurrentClassifier[Any]) -> bytes:
    """Serializes `model` as ONNX with one recurrent operator per layer.

    The operator works time-major (its `layout` attribute is not supported by ONNX Runtime's CPU kernel), so the
    graph transposes around it.
    """
    builder = GraphBuilder()
    layers = model.rnn.num_layers
    builder.weight("mean", model.mean)
    builder.weight("std", model.std)
    builder.node("Sub", [INPUT, "mean"], "centred")
    builder.node("Div", ["centred", "std"], "standardized")
    steps = builder.node("Transpose", ["standardized"], "steps", perm=[1, 0, 2])
    builder.integers("directions_axis", [1])

    names = state_names(model)
    initial, final = ([[f"{when}_{name}"] for name in names] for when in ("initial", "final"))
    if layers > 1:
        builder.integers("one_each", [1] * layers)
        initial, final = (
            [[f"{when}_{name}_l{layer}" for layer in range(layers)] for name in names] for when in ("initial", "final")
        )
        for name, parts in zip(names, initial, strict=True):
            builder.node("Split", [f"initial_{name}", "one_each"], parts, axis=0)
    for layer in range(layers):
        before, after = ([parts[layer] for parts in tensors] for tensors in (initial, final))
        steps = _add_layer(builder, model.rnn, layer, steps, before, after)
    if layers > 1:
        for name, parts in zip(names, final, strict=True):
            builder.node("Concat", parts, f"final_{name}", axis=0)

    builder.node("Transpose", [steps], STATES, perm=[1, 0, 2])
    builder.weight("fc.weight", model.fc.weight.T)
    builder.weight("fc.bias", model.fc.bias)
    builder.node("MatMul", [STATES, "fc.weight"], "readout")
    builder.node("Add", ["readout", "fc.bias"], LOGITS)
    graph = builder.graph(model.architecture, input_shapes(model), output_shapes(model))
    graph.doc_string = _DOC.format(_KINDS[model.architecture], model.rnn.mode.partition("_")[0])
    return serialize(graph, model, layout="batch-major")


def _add_layer(
    builder: GraphBuilder, rnn: nn.RNNBase, layer: int, steps: str, initial: list[str], final: list[str]
) -> str:
    """Adds one layer: `steps` [time, batch, features] and states [1, batch, hidden] in, all hidden states out."""
    operator, _, nonlinearity = rnn.mode.partition("_")
    gates = _GATES[operator]

    def ordered(name: str) -> Tensor:
        parts = getattr(rnn, f"{name}_l{layer}").chunk(len(gates))
        return torch.cat([parts[gate] for gate in gates])

    # The operator has an axis of directions first: one here.
    biases = torch.cat([ordered("bias_ih"), ordered("bias_hh")])
    weights = [
        builder.weight(f"rnn.weight_ih_l{layer}", ordered("weight_ih")[None]),
        builder.weight(f"rnn.weight_hh_l{layer}", ordered("weight_hh")[None]),
        builder.weight(f"rnn.bias_l{layer}", biases[None]),
    ]
    attributes: dict[str, Any] = {"activations": [nonlinearity.title()]} if operator == "RNN" else {}
    if operator == "GRU":
        attributes["linear_before_reset"] = 1  # PyTorch multiplies the product by the reset gate
    outputs = [f"directions_l{layer}", *final]
    # An empty name omits the operator's sequence lengths.
    builder.node(operator, [steps, *weights, "", *initial], outputs, hidden_size=rnn.hidden_size, **attributes)
    return builder.node("Squeeze", [outputs[0], "directions_axis"], f"states_l{layer}")
