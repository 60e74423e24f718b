"""Turns graphs of whole sequences into graphs of one timestep: the initial values of recurrent nodes become states."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from unroll_export.steps.cells import GATES, STATES, CellWriter, attributes_of
from unroll_export.steps.folding import add_constant, free_name, rename_input
from unroll_export.steps.pairing import find_pairs
from unroll_export.steps.reading import Source, graphs_of, value_of
from unroll_export.steps.sequence_graph import Original, SequenceGraph
from unroll_export.weight_files import ImportRefusedError

_STATE_INPUTS = (5, 6)


class Stepped(NamedTuple):
    """Graph of one timestep, made from a network of whole sequences.

    Attributes:
        source: The graph of a timestep, with the name and checksum of the original file.
        initial: States before the first step, by name; zeros if absent.
        states: Names of the states; their next values end in `_next`.
        original: Runs the network of whole sequences.
    """

    source: Source
    initial: Mapping[str, NDArray[Any]]
    states: tuple[str, ...]
    original: Original


def is_sequence_graph(source: Source) -> bool:
    """Returns True if a graph has recurrent nodes, and no state among its inputs and outputs by their names."""
    return bool(recurrent_nodes(source.model)) and not find_pairs(source.inputs, source.outputs)


def is_bidirectional(source: Source) -> bool:
    """Returns True if a recurrent node of a graph begins at the end of a sequence."""
    return any(attributes_of(node).get("direction", b"forward") != b"forward" for node in recurrent_nodes(source.model))


def to_steps(source: Source, constants: Mapping[str, NDArray[Any]]) -> Stepped:
    """Makes the graph of one timestep.

    Args:
        source: The graph of whole sequences.
        constants: Inputs with fixed values.

    Raises:
        ImportRefusedError: the graph has no such form. The message names the node.
    """
    source = with_constants(source, constants)
    nodes = recurrent_nodes(source.model)
    for node in nodes:
        _check(node)
    begun = [name for node in nodes for name in list(node.input)[5:7] if name]
    original = SequenceGraph(source, [nodes[0].input[0], *begun])
    original.measure(nodes[0].input[0])
    model = ModelProto()
    model.CopyFrom(source.model)
    types = {output.name: output.type.tensor_type.elem_type for output in model.graph.output}
    begins = original.initial_values(begun)
    states = _unroll(model)
    initial = {name: begins[begin] for name, (_, begin) in states.items() if begin and begins[begin].any()}
    _rewrite_inputs(original, model)
    _rewrite_outputs(original, model)
    graph = model.graph
    del graph.input[:], graph.output[:]
    element = helper.np_dtype_to_tensor_dtype(original.value.dtype)
    graph.input.append(helper.make_tensor_value_info(original.value.name, element, ["batch", *original.shape]))
    for name, (hidden, _) in states.items():
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "batch", hidden]))
        types[f"{name}_next"] = TensorProto.FLOAT
    graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in types.items())
    drop_unused(model)
    inputs, outputs = (tuple(map(value_of, values)) for values in (graph.input, graph.output))
    return Stepped(replace(source, model=model, inputs=inputs, outputs=outputs), initial, tuple(states), original)


def _unroll(model: ModelProto) -> dict[str, tuple[int, str]]:
    """Rewrites the recurrent nodes; returns the size of each state and the name of its initial value, by state."""
    graph = model.graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and attributes_of(node).keys() == {"value"}:
            weights[node.output[0]] = numpy_helper.to_array(attributes_of(node)["value"])
    _open_reshapes(model, weights)
    taken = {name for node in graph.node for name in node.output}
    states: dict[str, tuple[int, str]] = {}
    rewritten: list[NodeProto] = []
    number = 0
    for node in graph.node:
        if node.op_type not in GATES:
            rewritten.append(node)
            continue
        prefix = f"{node.op_type.lower()}{number}"
        while any(name.startswith(prefix) for name in taken):
            prefix += "_"
        number += 1
        before = [f"{prefix}_{state}" for state in STATES[node.op_type]]
        after = [f"{name}_next" for name in before]
        inputs = [*node.input, *[""] * 8][:8]
        for name, place in zip(before, _STATE_INPUTS, strict=False):
            states[name] = int(attributes_of(node)["hidden_size"]), inputs[place]
        cell = CellWriter(prefix)
        if cell.write(node, weights, before, after):
            rewritten += cell.nodes
            graph.initializer.extend(cell.tensors)
        else:
            rewritten += _with_states(node, inputs, before, after)
    del graph.node[:]
    graph.node.extend(rewritten)
    return states


def _open_reshapes(model: ModelProto, constants: Mapping[str, NDArray[Any]]) -> None:
    """Makes time and batch dynamic in Reshape nodes that remove the direction from states by fixed sizes."""
    # In a shape, 0 keeps a size. [time, 1, batch, hidden] or [time, batch, 1, hidden] becomes [time, batch, hidden].
    opened: dict[str, list[int]] = {}
    for node in model.graph.node:
        if node.op_type in GATES:
            opened[node.output[0]] = [0, -1, int(attributes_of(node)["hidden_size"])]
        elif (
            node.op_type == "Transpose" and node.input[0] in opened and attributes_of(node).get("perm") == [0, 2, 1, 3]
        ):
            opened[node.output[0]] = [0, 0, opened[node.input[0]][2]]
        elif node.op_type == "Reshape" and node.input[0] in opened and node.input[1] in constants:
            shape, target = constants[node.input[1]].tolist(), opened[node.input[0]]
            if len(shape) == 3 and shape[2] == target[2]:
                node.input[1] = add_constant(model.graph, f"{node.output[0]}_shape", np.array(target, np.int64))


def recurrent_nodes(model: ModelProto) -> list[NodeProto]:
    """Returns the recurrent nodes of a graph, in order."""
    return [node for node in model.graph.node if node.op_type in GATES]


def _check(node: NodeProto) -> None:
    label = f"{node.op_type} {node.name or node.output[0]!r}"
    direction = attributes_of(node).get("direction", b"forward").decode()
    if direction != "forward":
        raise ImportRefusedError(
            f"{label}: direction {direction}: its output at a step depends on later steps; --form whole"
        )
    if len(node.input) > 4 and node.input[4]:
        raise ImportRefusedError(f"{label}: export the model without sequence_lens, since the server handles lengths")


def with_constants(source: Source, constants: Mapping[str, NDArray[Any]]) -> Source:
    """Returns a copy of a source with some inputs fixed at values."""
    model = ModelProto()
    model.CopyFrom(source.model)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    kept = [value for value in model.graph.input if value.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    inputs = tuple(value for value in source.inputs if value.name not in constants)
    return replace(source, model=model, inputs=inputs)


def _with_states(node: NodeProto, inputs: list[str], before: list[str], after: list[str]) -> list[NodeProto]:
    """Returns a recurrent node as it is, except that its initial values are the states."""
    for name, place in zip(before, _STATE_INPUTS, strict=False):
        inputs[place] = name
    while not inputs[-1]:
        inputs.pop()
    outputs = [*node.output, *[""] * 3][: 1 + len(before)]
    copies = []
    for index, name in enumerate(after):
        outputs[1 + index] = outputs[1 + index] or f"{name}_value"
        copies.append(helper.make_node("Identity", [outputs[1 + index]], [name]))
    own = NodeProto()
    own.CopyFrom(node)
    del own.input[:], own.output[:]
    own.input.extend(inputs)
    own.output.extend(outputs)
    return [own, *copies]


def _rewrite_inputs(original: SequenceGraph, model: ModelProto) -> None:
    """Inserts a time dimension of one step into the input."""
    graph, name = model.graph, original.value.name
    whole = free_name(graph, f"{name}_step")
    rename_input(graph, name, whole)
    shape = [*((-1, 1) if original.batch_first else (1, -1)), *original.shape]
    constant = add_constant(graph, f"{name}_step_shape", np.array(shape, np.int64))
    graph.node.insert(0, helper.make_node("Reshape", [name, constant], [whole]))


def _rewrite_outputs(original: SequenceGraph, model: ModelProto) -> None:
    """Removes the time dimension, of one step, from the outputs."""
    graph = model.graph
    zero = add_constant(graph, "first_step", np.array(0, np.int64))
    for name, axis in original.time_axes.items():
        if axis is not None:
            whole = free_name(graph, f"{name}_steps")
            rename_input(graph, name, whole)
            for node in graph.node:
                node.output[:] = [whole if output == name else output for output in node.output]
            graph.node.append(helper.make_node("Gather", [whole, zero], [name], axis=axis))


def drop_unused(model: ModelProto) -> None:
    """Removes nodes and tensors that no output needs, such as those that computed the initial states."""
    graph = model.graph
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    needed.update(
                        name for inner in graphs_of(attribute.g) for each in inner.node for name in each.input
                    )
                    needed.update(value.name for inner in graphs_of(attribute.g) for value in inner.output)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    tensors = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
