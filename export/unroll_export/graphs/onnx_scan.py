"""`model.scan.onnx`: a SimpleRNN as ONNX Scan, time-major; fast on CPU, the same bits at every batch size and cut.

Why this form:

- All products have a constant right-hand side, which ONNX Runtime packs once, when the model is loaded. The packed
  kernel sums over the inner dimension in one order whatever the number of rows, so a row's bits depend on nothing
  beside it. (The RNN operator packs its recurrent weights anew at every step, and takes another kernel for one row.)
- What has no recurrence is done for all steps at once: one product for the input of a layer, one for the logits.
- The bias rides in the input product, as the last row of its matrix against a feature that is always 1. A separate
  Add would go through memory once more; with it a whole run takes a fifth longer at 64 lanes.
"""

import torch

from unroll_export.graphs.onnx_graph import GraphBuilder, serialize
from unroll_export.graphs.tensors import (
    BATCH,
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
    "Elman network: standardization, a Scan of MatMul, Add, Tanh for each layer, linear readout of every step. "
    "Time-major: input and states are [time, batch, ...], initial_state and final_state are [layers, batch, hidden]."
)


def build_onnx_scan(model: SimpleRNN) -> bytes:
    """Serializes `model` as ONNX with one Scan a layer, time-major."""
    builder = GraphBuilder()
    layers = model.rnn.num_layers
    builder.weight("mean", model.mean)
    builder.weight("std", model.std)
    builder.node("Sub", [INPUT, "mean"], "centred")
    steps = builder.node("Div", ["centred", "std"], "standardized")
    builder.integers("pads", [0, 0, 0, 0, 0, 1])
    builder.weight("one", torch.tensor(1.0))
    builder.integers("layer_axis", [0])

    final = [FINAL_STATE] if layers == 1 else [f"final_state_l{layer}" for layer in range(layers)]
    for layer in range(layers):
        states = STATES if layer == layers - 1 else f"states_l{layer}"
        _add_layer(builder, model, layer, steps, states, final[layer])
        steps = states
    if layers > 1:
        builder.node("Concat", final, FINAL_STATE, axis=0)

    builder.weight("fc.weight", model.fc.weight.T)
    builder.weight("fc.bias", model.fc.bias)
    builder.node("MatMul", [STATES, "fc.weight"], "readout")
    builder.node("Add", ["readout", "fc.bias"], LOGITS)
    graph = builder.graph("simple_rnn_scan", input_shapes(model, True), output_shapes(model, True))
    graph.doc_string = DOC
    return serialize(graph, model, layout="time-major")


def _add_layer(builder: GraphBuilder, model: SimpleRNN, layer: int, steps: str, states: str, final: str) -> None:
    """Adds one layer: `steps` [time, batch, features] in, `states` and `final` [1, batch, hidden] out."""
    rnn = model.rnn
    bias = getattr(rnn, f"bias_ih_l{layer}") + getattr(rnn, f"bias_hh_l{layer}")
    weight_and_bias = torch.cat([getattr(rnn, f"weight_ih_l{layer}").T, bias[None]])
    projection = builder.weight(f"rnn.weight_and_bias_ih_l{layer}", weight_and_bias)
    recurrence = builder.weight(f"rnn.weight_hh_l{layer}", getattr(rnn, f"weight_hh_l{layer}").T)
    padded = builder.node("Pad", [steps, "pads", "one"], f"with_one_l{layer}")
    drive = builder.node("MatMul", [padded, projection], f"drive_l{layer}")
    index = builder.integers(f"index_l{layer}", layer)
    initial = builder.node("Gather", [INITIAL_STATE, index], f"initial_state_l{layer}", axis=0)

    # Names inside the body are apart from those outside, as ONNX asks; `recurrence` is the one taken from there.
    body = GraphBuilder()
    body.node("MatMul", [f"h_l{layer}", recurrence], f"recurrent_l{layer}")
    body.node("Add", [f"recurrent_l{layer}", f"drive_t_l{layer}"], f"activation_l{layer}")
    body.node("Tanh", [f"activation_l{layer}"], f"h_next_l{layer}")
    body.node("Identity", [f"h_next_l{layer}"], f"state_l{layer}")
    shape = (BATCH, rnn.hidden_size)
    inputs = {f"h_l{layer}": shape, f"drive_t_l{layer}": shape}
    outputs = {f"h_next_l{layer}": shape, f"state_l{layer}": shape}
    step = body.graph(f"step_l{layer}", inputs, outputs)
    builder.node("Scan", [initial, drive], [f"h_last_l{layer}", states], body=step, num_scan_inputs=1)
    builder.node("Unsqueeze", [f"h_last_l{layer}", "layer_axis"], final)
