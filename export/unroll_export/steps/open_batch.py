"""Opens the batch of graphs that torch's exporter writes with the sizes of its example, as behind two reshapes."""

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from unroll_export.steps.folding import add_constant, free_name


def open_batch(one: ModelProto, other: ModelProto, batches: tuple[int, int], values: str) -> None:
    """Replaces the sizes that hold the batch by multiples of the batch of the values.

    Args:
        one: The export of an example; changed.
        other: The export of an example with more sequences, where just these sizes differ.
        batches: Sequences of both examples.
        values: Input of both, [batch, ...].
    """
    graph = one.graph
    others = _sizes(other.graph)
    nodes: list[NodeProto] = []
    for name, sizes in _sizes(graph).items():
        more = others.get(name, sizes)
        if sizes.shape != more.shape or (sizes == more).all():
            continue
        factors, rest = np.divmod(more - sizes, batches[1] - batches[0])
        if rest.any() or (sizes[factors != 0] != (factors * batches[0])[factors != 0]).any():
            continue
        if not nodes:
            batch = free_name(graph, f"{values}_batch")
            nodes.append(helper.make_node("Shape", [values], [batch], start=0, end=1))
        fixed = add_constant(graph, f"{name}_fixed", np.where(factors == 0, sizes, 0).reshape(-1))
        times = add_constant(graph, f"{name}_factors", factors.reshape(-1))
        shape = add_constant(graph, f"{name}_shape", np.array(sizes.shape, np.int64))
        held, flat = free_name(graph, f"{name}_held"), free_name(graph, f"{name}_flat")
        nodes += [
            helper.make_node("Mul", [times, batch], [held]),
            helper.make_node("Add", [held, fixed], [flat]),
            helper.make_node("Reshape", [flat, shape], [name]),
        ]
    opened = {name for node in nodes for name in node.output}
    kept = [node for node in graph.node if not opened.intersection(node.output)]
    tensors = [tensor for tensor in graph.initializer if tensor.name not in opened]
    del graph.node[:], graph.initializer[:]
    graph.node.extend([*nodes, *kept])
    graph.initializer.extend(tensors)


def _sizes(graph: GraphProto) -> dict[str, NDArray[np.int64]]:
    """The constants of a graph that can be sizes."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensors[node.output[0]] = node.attribute[0].t
    return {
        name: numpy_helper.to_array(tensor)
        for name, tensor in tensors.items()
        if tensor.data_type == TensorProto.INT64 and len(tensor.dims) < 2
    }
