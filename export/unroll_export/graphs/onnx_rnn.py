"""`model.onnx`: a SimpleRNN as the standard ONNX RNN operator, batch-major, for any runtime."""

import torch

from unroll_export.graphs.onnx_graph import GraphBuilder, serialize
from unroll_export.graphs.tensors import (
    FINAL_STATE,
    INITIAL_STATE,
    INPUT,
    LOGITS,
    STATES,
    input_shapes,
    output_shapes,
)
from unroll_export.model import SimpleRNN

DOC = (
    "Elman network: standardization, RNN operators with tanh, linear readout of every step. Batch-major: input and "
    "states are [batch, time, ...], initial_state and final_state are [layers, batch, hidden]."
)


def build_onnx_rnn(model: SimpleRNN) -> bytes:
    """Serializes `model` as ONNX with one RNN operator a layer.

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

    initial, final = [INITIAL_STATE], [FINAL_STATE]
    if layers > 1:
        initial = [f"initial_state_l{layer}" for layer in range(layers)]
        final = [f"final_state_l{layer}" for layer in range(layers)]
        builder.node("Split", [INITIAL_STATE, builder.integers("one_each", [1] * layers)], initial, axis=0)
    for layer in range(layers):
        steps = _add_layer(builder, model, layer, steps, initial[layer], final[layer])
    if layers > 1:
        builder.node("Concat", final, FINAL_STATE, axis=0)

    builder.node("Transpose", [steps], STATES, perm=[1, 0, 2])
    builder.weight("fc.weight", model.fc.weight.T)
    builder.weight("fc.bias", model.fc.bias)
    builder.node("MatMul", [STATES, "fc.weight"], "readout")
    builder.node("Add", ["readout", "fc.bias"], LOGITS)
    graph = builder.graph("simple_rnn", input_shapes(model), output_shapes(model))
    graph.doc_string = DOC
    return serialize(graph, model, layout="batch-major")


def _add_layer(builder: GraphBuilder, model: SimpleRNN, layer: int, steps: str, initial: str, final: str) -> str:
    """Adds one layer: `steps` [time, batch, features] and `initial` [1, batch, hidden] in, all states out."""
    rnn = model.rnn
    # The operator has an axis of directions first: one here.
    biases = torch.cat([getattr(rnn, f"bias_ih_l{layer}"), getattr(rnn, f"bias_hh_l{layer}")])
    weights = [
        builder.weight(f"rnn.weight_ih_l{layer}", getattr(rnn, f"weight_ih_l{layer}")[None]),
        builder.weight(f"rnn.weight_hh_l{layer}", getattr(rnn, f"weight_hh_l{layer}")[None]),
        builder.weight(f"rnn.bias_l{layer}", biases[None]),
    ]
    outputs = [f"directions_l{layer}", final]
    # The empty name leaves out the operator's sequence lengths.
    builder.node("RNN", [steps, *weights, "", initial], outputs, hidden_size=rnn.hidden_size, activations=["Tanh"])
    return builder.node("Squeeze", [outputs[0], "directions_axis"], f"states_l{layer}")
