"""Reads ONNX files from any source, and converts them to the form of a bundle's graph."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, ValueInfoProto, numpy_helper
from onnx.inliner import inline_local_functions

from unroll_engine.kernel import UnsupportedNetworkError
from unroll_engine.runtimes.step_graph import DTYPES, check_step_graph
from unroll_export.weight_files import ImportRefusedError
from unroll_proto.bundle import MAX_STEP_MODEL_BYTES

Dim = int | str
"""Returns a size, or the name of an open dimension; "?" if it has none."""


@dataclass(frozen=True, slots=True)
class Value:
    """An input or an output of a graph.

    Attributes:
        name: Its name.
        dtype: Its number format.
        dims: Its dimensions; None if their number is unknown.
    """

    name: str
    dtype: np.dtype[Any]
    dims: tuple[Dim, ...] | None

    def __str__(self) -> str:
        dims = "[...]" if self.dims is None else f"[{', '.join(map(str, self.dims))}]"
        return f"{self.name!r} {self.dtype} {dims}"


@dataclass(frozen=True, slots=True)
class Source:
    """An ONNX file that was read.

    Attributes:
        file: Its name, without the path.
        sha256: SHA-256 of its content, hexadecimal.
        content: Its content.
        model: The bare graph: no documentation, no functions, values of tensors as raw data.
        inputs: Inputs of the graph, without those that have values in the file.
        outputs: Outputs of the graph.
    """

    file: str
    sha256: str
    content: bytes
    model: ModelProto
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


def read_source(path: Path) -> Source:
    """Reads an ONNX file and checks that it can be trusted.

    Raises:
        ImportRefusedError: it is not an ONNX file, or a part can't be served. The message names the node or tensor.
        OSError: it can't be read.
    """
    size = path.stat().st_size
    if size > MAX_STEP_MODEL_BYTES:
        raise ImportRefusedError(f"{path}: {size} bytes, {MAX_STEP_MODEL_BYTES} at most")
    return source_of(path.name, path.read_bytes())


def source_of(file: str, content: bytes) -> Source:
    """Reads the content of an ONNX file; see `read_source`."""
    try:
        model = onnx.load_from_string(content)
    except DecodeError:
        raise ImportRefusedError(f"{file}: not an ONNX model") from None
    if not model.graph.node:
        raise ImportRefusedError(f"{file}: not an ONNX model, or one without nodes")
    _normalize(model)
    try:
        check_step_graph(model.SerializeToString())
    except UnsupportedNetworkError as error:
        raise ImportRefusedError(f"{file}: {error}") from None
    known = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(value_of(each) for each in model.graph.input if each.name not in known)
    outputs = tuple(value_of(each) for each in model.graph.output)
    return Source(file, hashlib.sha256(content).hexdigest(), content, model, inputs, outputs)


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """Yields the graph and its subgraphs."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from graphs_of(attribute.g)


def _normalize(model: ModelProto) -> None:
    """Removes parts that a graph does not need; refuses a graph that this would change."""
    if model.functions:
        inlined = inline_local_functions(model)
        model.Clear()
        model.MergeFrom(inlined)
        del model.functions[:]
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string", "training_info"):
        model.ClearField(field)
    del model.metadata_props[:]
    used = {node.domain for graph in graphs_of(model.graph) for node in graph.node}
    used = {"" if domain == "ai.onnx" else domain for domain in used}
    opsets = [each for each in model.opset_import if ("" if each.domain == "ai.onnx" else each.domain) in used]
    versions = {each.domain: each.version for each in opsets}
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in versions.items())
    for graph in graphs_of(model.graph):
        if graph.sparse_initializer:
            raise ImportRefusedError(
                f"tensor {graph.sparse_initializer[0].values.name!r}: sparse tensors can't be served"
            )
        for field in ("value_info", "quantization_annotation", "metadata_props", "doc_string"):
            graph.ClearField(field)
        for tensor in graph.initializer:
            _make_raw(tensor)
        for value in (*graph.input, *graph.output):
            value.ClearField("doc_string")
            value.ClearField("metadata_props")
        for node in graph.node:
            node.ClearField("doc_string")
            node.ClearField("metadata_props")
            node.ClearField("overload")
            node.ClearField("device_configurations")
            for attribute in node.attribute:
                attribute.ClearField("doc_string")
                if attribute.type == AttributeProto.TENSOR:
                    _make_raw(attribute.t)


def _make_raw(tensor: TensorProto) -> None:
    if tensor.data_location == TensorProto.EXTERNAL:
        raise ImportRefusedError(
            f"tensor {tensor.name!r}: its values are in another file; save the model with its data inside, as "
            "onnx.save(onnx.load(FILE), OUT) does"
        )
    if tensor.data_type == TensorProto.STRING:
        raise ImportRefusedError(f"tensor {tensor.name!r}: text can't be served")
    tensor.ClearField("doc_string")
    tensor.ClearField("metadata_props")
    tensor.ClearField("data_location")
    if not tensor.HasField("raw_data"):
        name = tensor.name
        raw = numpy_helper.from_array(numpy_helper.to_array(tensor), name)
        tensor.CopyFrom(raw)


def value_of(value: ValueInfoProto) -> Value:
    """Reads the description of an input or an output."""
    tensor = value.type.tensor_type
    dtype = DTYPES.get(tensor.elem_type)
    if dtype is None or not value.type.HasField("tensor_type"):
        kind = (
            TensorProto.DataType.Name(tensor.elem_type).lower() if value.type.HasField("tensor_type") else "no tensor"
        )
        known = ", ".join(str(each) for each in DTYPES.values())
        raise ImportRefusedError(f"{value.name!r}: {kind}, one of {known} expected")
    if not tensor.HasField("shape"):
        return Value(value.name, dtype, None)
    dims = [
        each.dim_value if each.HasField("dim_value") and each.dim_value > 0 else each.dim_param or "?"
        for each in tensor.shape.dim
    ]
    return Value(value.name, dtype, tuple(dims))
