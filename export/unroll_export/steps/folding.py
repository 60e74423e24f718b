"""Makes the step graph of a source: its own nodes, with constants and contexts folded in."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, helper, numpy_helper
from onnxruntime import InferenceSession

from unroll_engine.runtimes.step_session import step_session
from unroll_export.steps.plan import Plan
from unroll_export.steps.reading import Source
from unroll_export.weight_files import ImportRefusedError
from unroll_proto.step_model import BATCH, OUTPUT_DTYPES, StepTensor


def fold(source: Source, plan: Plan) -> ModelProto:
    """Makes the graph from the inputs and states of a plan to its outputs and next states."""
    model = ModelProto()
    model.CopyFrom(source.model)
    graph = model.graph
    for state in plan.states:
        if state.context_of:
            context, values = state.tensor, state.context_of
            whole = free_name(graph, f"{values}_with_context")
            rename_input(graph, values, whole)
            # With the graph's own rank: the batch is one of its dimensions, unless sequences run alone.
            axis = len(context.dims) + context.batched - 1
            width = context.dims[-1]
            bounds = [
                add_constant(graph, f"{context.name}_{name}", np.array([number], np.int64))
                for name, number in (("from", -width), ("to", np.iinfo(np.int64).max), ("axis", axis))
            ]
            graph.node.insert(0, helper.make_node("Concat", [context.name, values], [whole], axis=axis))
            graph.node.append(helper.make_node("Slice", [whole, *bounds], [state.next]))
    for name, value in plan.constants.items():
        graph.initializer.append(numpy_helper.from_array(value, name))
    del graph.input[:]
    for tensor in (*plan.inputs, *(state.tensor for state in plan.states)):
        graph.input.append(_described(tensor))
    types = {value.name: value.dtype for value in source.outputs}
    types |= {state.next: state.tensor.dtype for state in plan.states}
    del graph.output[:]
    for name in (*plan.outputs, *(state.next for state in plan.states if state.next)):
        # Shapes declared by exporters can be wrong, so they are found by running the graph.
        graph.output.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(types[name]), None))
    return model


def measure_outputs(content: bytes, plan: Plan) -> tuple[StepTensor, ...]:
    """Finds the dimensions of the outputs of a step graph, and where their batch is, by running it.

    Raises:
        ImportRefusedError: the graph doesn't run, an output or a next state has no batch, or a state changes its
            dimensions.
    """
    session = _opened(content)
    names = [*plan.outputs, *(state.next for state in plan.states if state.next)]
    sizes = (1,) if plan.alone else (3, 5)
    found = []
    for lanes in sizes:
        feeds = {}
        for tensor in plan.inputs:
            feeds[tensor.name] = np.zeros(tensor.batch_dims(lanes), tensor.dtype)
        for state in plan.states:
            feeds[state.tensor.name] = initial_batch(state.tensor, state.initial, lanes)
        try:
            found.append(dict(zip(names, session.run(names, feeds), strict=True)))
        except Exception as error:  # onnxruntime has types of its own for each failure
            if plan.alone:
                raise ImportRefusedError(f"the graph doesn't run: {one_line(error)}") from error
            problem = f"the batch can't be widened to {lanes}: {holder_of(error)}; --alone runs sequences one at a time"
            raise ImportRefusedError(problem) from error
    for state in plan.states:
        for lanes, arrays in zip(sizes, found, strict=True):
            expected = state.tensor.batch_dims(lanes)
            if state.next and arrays[state.next].shape != expected:
                raise ImportRefusedError(
                    f"state {state.tensor.name!r}: its next value {state.next!r} of {lanes} sequences is "
                    f"{list(arrays[state.next].shape)}, {list(expected)} expected"
                )
    return tuple(_output(name, [arrays[name] for arrays in found], sizes) for name in plan.outputs)


def initial_batch(tensor: StepTensor, initial: NDArray[Any] | None, lanes: int) -> NDArray[Any]:
    """Returns the value of a state tensor before the first step of `lanes` sequences."""
    array = np.zeros(tensor.batch_dims(lanes), tensor.dtype)
    if initial is not None:
        array[:] = np.expand_dims(initial, len(tensor.before)) if tensor.batched else initial
    return array


def holder_of(error: Exception) -> str:
    """Returns the node that an error of onnxruntime names, or else the error itself."""
    found = re.search(r"while running (\w+) node\. Name:'([^']*)'", str(error))
    return f"{found[1]} {found[2]!r} holds it" if found else one_line(error)


def one_line(error: Exception) -> str:
    """Returns the message of an error as one line of bounded length."""
    return " ".join(str(error).split())[:300]


def _opened(content: bytes) -> InferenceSession:
    try:
        return step_session(content)
    except Exception as error:
        raise ImportRefusedError(f"onnxruntime can't load the graph: {one_line(error)}") from error


def _output(name: str, arrays: Sequence[NDArray[Any]], sizes: Sequence[int]) -> StepTensor:
    shapes = [array.shape for array in arrays]
    dtype = arrays[0].dtype
    if dtype.name not in OUTPUT_DTYPES:
        raise ImportRefusedError(f"output {name!r}: {dtype}, one of {', '.join(OUTPUT_DTYPES)} expected")
    if len(sizes) == 1:
        return StepTensor(name, dtype, (), shapes[0], batched=False)
    axes = [axis for axis, dims in enumerate(zip(*shapes, strict=False)) if dims == tuple(sizes)]
    if len({len(shape) for shape in shapes}) > 1 or not axes:
        raise ImportRefusedError(
            f"output {name!r}: {list(shapes[0])} of {sizes[0]} sequences, {list(shapes[1])} of {sizes[1]}: it has no "
            "batch; --alone runs sequences one at a time"
        )
    axis, shape = axes[0], shapes[0]
    if any(one[:axis] + one[axis + 1 :] != shape[:axis] + shape[axis + 1 :] for one in shapes):
        raise ImportRefusedError(f"output {name!r}: its dimensions {list(shape)} change with the number of sequences")
    return StepTensor(name, dtype, shape[:axis], shape[axis + 1 :], batched=True)


def _described(tensor: StepTensor) -> onnx.ValueInfoProto:
    dims: list[int | str] = [*tensor.before, *([BATCH] if tensor.batched else []), *tensor.after]
    return helper.make_tensor_value_info(tensor.name, helper.np_dtype_to_tensor_dtype(tensor.dtype), dims)


def add_constant(graph: GraphProto, wanted: str, value: NDArray[Any]) -> str:
    """Adds a tensor to a graph under the wanted name, or one like it; returns the name."""
    name = free_name(graph, wanted)
    graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def free_name(graph: GraphProto, wanted: str) -> str:
    """Returns a name that no value of the graph has, nor any in graphs inside it: the wanted one if it can."""
    used: set[str] = set()

    def collect(inner: GraphProto) -> None:
        used.update(each.name for each in inner.input)
        used.update(each.name for each in inner.initializer)
        for node in inner.node:
            used.update((*node.input, *node.output))
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    collect(attribute.g)

    collect(graph)
    while wanted in used:
        wanted += "_"
    return wanted


def rename_input(graph: GraphProto, old: str, new: str) -> None:
    """Renames a value wherever nodes take it, in graphs inside too, and where it is an output."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                rename_input(attribute.g, old, new)
    for output in graph.output:
        if output.name == old:
            output.name = new
