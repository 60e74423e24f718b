"""Specializes a step graph for its sizes: takes the branches that it always takes, and computes what never changes."""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, helper, numpy_helper

from unroll_engine.runtimes.step_session import step_session
from unroll_export.steps.folding import initial_batch, one_line
from unroll_export.steps.plan import Plan
from unroll_export.steps.reading import graphs_of
from unroll_export.weight_files import ImportRefusedError

Arrays = dict[str, NDArray[Any]]
_LANES = (3, 5)


def specialize(model: ModelProto, plan: Plan) -> Arrays:
    """Takes `If` out of a graph, and replaces by tensors what is the same in runs of other values and batches.

    Returns:
        All values of a run of `_LANES[0]` sequences, by name.

    Raises:
        ImportRefusedError: a branch depends on the values of a sequence, or the graph doesn't run.
    """
    graph = model.graph
    for number in range(1000):
        choices = [node for node in graph.node if node.op_type == "If"]
        if not choices:
            break
        conditions = [node.input[0] for node in choices]
        one, other = _run_twice(model, plan, conditions)
        taken = {name: bool(one[name].all()) for name in conditions if name in one}
        _inline(graph, {name: value for name, value in taken.items() if value == bool(other[name].all())}, number)
    names = [name for node in graph.node for name in node.output if name]
    one, other = _run_twice(model, plan, names)
    ends = {output.name for output in graph.output}
    fixed = {
        name: array
        for name, array in one.items()
        if name not in ends and array.shape == other[name].shape and array.tobytes() == other[name].tobytes()
    }
    kept = [node for node in graph.node if not all(name in fixed or not name for name in node.output)]
    del graph.node[:]
    graph.node.extend(kept)
    needed = {name for node in kept for name in node.input}
    graph.initializer.extend(numpy_helper.from_array(fixed[name], name) for name in fixed if name in needed)
    return one


def _run_twice(model: ModelProto, plan: Plan, names: list[str]) -> tuple[Arrays, Arrays]:
    """Values by name of two runs, of other values and another number of sequences."""
    shown = ModelProto()
    shown.CopyFrom(model)
    known = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    ends = {output.name for output in model.graph.output}
    given = {value.name for value in model.graph.input} | {tensor.name for tensor in model.graph.initializer}
    seen = [name for name in dict.fromkeys(names) if name in known and name not in ends | given]
    for name in seen:
        kind = known[name].type.tensor_type.elem_type
        shown.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    found: list[Arrays] = []
    session = step_session(shown.SerializeToString(), optimized=False)
    wanted = [*seen, *ends]
    for seed, lanes in enumerate(_LANES):
        rng = np.random.default_rng(seed)
        feeds: Arrays = {}
        for tensor in plan.inputs:
            shape = tensor.batch_dims(lanes)
            values = rng.integers(0, 2, shape) if tensor.dtype.kind in "iu" else rng.standard_normal(shape)
            feeds[tensor.name] = values.astype(tensor.dtype)
        for state in plan.states:
            feeds[state.tensor.name] = initial_batch(state.tensor, state.initial, lanes)
        try:
            found.append(feeds | dict(zip(wanted, session.run(wanted, feeds), strict=True)))
        except Exception as error:
            raise ImportRefusedError(f"--form matmul: the graph doesn't run: {one_line(error)}") from error
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return found[0] | tensors, found[1] | tensors


def _inline(graph: GraphProto, conditions: dict[str, bool], number: int) -> None:
    """Puts the branch of each outermost `If` in its place."""
    nodes: list[NodeProto] = []
    for index, node in enumerate(graph.node):
        if node.op_type != "If":
            nodes.append(node)
            continue
        if node.input[0] not in conditions:
            raise ImportRefusedError(f"--form matmul: If {node.name or node.output[0]!r} depends on the values")
        wanted = "then_branch" if conditions[node.input[0]] else "else_branch"
        branch = next(each.g for each in node.attribute if each.name == wanted)
        prefix = f"if{number}_{index}_"
        own = {name: prefix + name for each in branch.node for name in each.output if name}
        own |= {tensor.name: prefix + tensor.name for tensor in branch.initializer}
        for tensor in branch.initializer:
            graph.initializer.append(tensor)
            graph.initializer[-1].name = own[tensor.name]
        for each in branch.node:
            nodes.append(NodeProto())
            nodes[-1].CopyFrom(each)
            nodes[-1].output[:] = [own.get(name, name) for name in each.output]
            _rename(nodes[-1], own)
        for outer, inner in zip(node.output, branch.output, strict=True):
            nodes.append(helper.make_node("Identity", [own.get(inner.name, inner.name)], [outer]))
    copies = [NodeProto() for _ in nodes]
    for copy, node in zip(copies, nodes, strict=True):
        copy.CopyFrom(node)
    del graph.node[:]
    graph.node.extend(copies)


def _rename(node: NodeProto, names: dict[str, str]) -> None:
    """Renames what a node takes, and what graphs inside it take from outside."""
    node.input[:] = [names.get(name, name) for name in node.input]
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            for inner in graphs_of(attribute.g):
                for each in inner.node:
                    each.input[:] = [names.get(name, name) for name in each.input]
                for output in inner.output:
                    output.name = names.get(output.name, output.name)
