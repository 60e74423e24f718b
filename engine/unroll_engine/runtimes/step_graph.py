"""Checks the graph of a step model, which is untrusted, before ONNX Runtime gets it.

The graph may have any form. So what it can do is bounded: operators of ONNX's own that compute one result from their
inputs and always end, every tensor in the file and as large as the file says.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from unroll_engine.kernel.onnx_file import known_only, require, short
from unroll_proto.onnx.onnx_pb2 import AttributeProto, GraphProto, NodeProto, TensorProto

OPSETS = range(7, 25)
MAX_NODES = 20_000
"""Nodes of a graph, those inside `If` included."""
MAX_TENSORS = 20_000
MAX_DEPTH = 16
"""Graphs inside each other."""

_OPERATORS = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization BitShift BitwiseAnd
BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu CenterCropPad Clip Compress Concat Constant ConstantOfShape
Conv ConvInteger ConvTranspose Cos Cosh CumSum DFT DepthToSpace DequantizeLinear Det Div Dropout
DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu
Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HannWindow
HammingWindow HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LRN LSTM
LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization LpPool MatMul MatMulInteger Max MaxPool
Mean MeanVarianceNormalization MelWeightMatrix Min Mish Mod Mul Neg NonZero Not OneHot Or PRelu Pad Pow QLinearConv
QLinearMatMul QuantizeLinear RMSNormalization RNN Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence Round STFT
ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign
SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unique Unsqueeze
Upsample Where Xor
"""
OPERATORS = frozenset(_OPERATORS.split())
"""Operators that a graph may have. None repeats a graph, draws random numbers, or reads more than its inputs."""

ITEM_BYTES: dict[int, int] = {
    TensorProto.FLOAT: 4,
    TensorProto.UINT8: 1,
    TensorProto.INT8: 1,
    TensorProto.INT32: 4,
    TensorProto.INT64: 8,
    TensorProto.BOOL: 1,
    TensorProto.FLOAT16: 2,
    TensorProto.DOUBLE: 8,
}
"""Bytes of a number, by the data types that a tensor may have."""

_REFUSED = {
    "Loop": "a loop can run for ever",
    "Scan": "a graph that is repeated can't be served",
    "RandomNormal": "random numbers",
    "RandomUniform": "random numbers",
    "RandomNormalLike": "random numbers",
    "RandomUniformLike": "random numbers",
    "Bernoulli": "random numbers",
    "Multinomial": "random numbers",
}


def check_step_graph(content: bytes) -> GraphProto:
    """Reads the graph of a file.

    Raises:
        UnsupportedNetworkError: the file is not such a graph. The message names the node or the tensor.
    """
    model = known_only(content)
    opsets = {opset.domain or "ai.onnx": opset.version for opset in model.opset_import}
    require(opsets.keys() == {"ai.onnx"}, f"operator sets {short(sorted(opsets))}: only ONNX's own can be served")
    version = opsets["ai.onnx"]
    require(version in OPSETS, f"operator set {version}, {OPSETS[0]} to {OPSETS[-1]} expected")
    nodes = tensors = 0
    for graph, depth in graphs_of(model.graph):
        require(depth <= MAX_DEPTH, f"more than {MAX_DEPTH} graphs inside each other")
        nodes += len(graph.node)
        require(nodes <= MAX_NODES, f"more than {MAX_NODES} nodes")
        tensors += len(graph.initializer)
        require(tensors <= MAX_TENSORS, f"more than {MAX_TENSORS} tensors")
        for tensor in graph.initializer:
            _check_tensor(tensor, f"tensor {short(tensor.name)}")
        for node in graph.node:
            _check_node(node)
    return model.graph


def graphs_of(graph: GraphProto, depth: int = 0) -> Iterator[tuple[GraphProto, int]]:
    """The graph and those inside it, each with its depth."""
    yield graph, depth
    if depth <= MAX_DEPTH:
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    yield from graphs_of(attribute.g, depth + 1)


def label_of(node: NodeProto) -> str:
    """A node's operator and name, for messages."""
    return f"{short(node.op_type)[1:-1]} {short(node.name or next(iter(node.output), ''))}"


def _check_node(node: NodeProto) -> None:
    label = label_of(node)
    require(
        node.domain in ("", "ai.onnx"), f"{label}: of {short(node.domain)}, only ONNX's own operators can be served"
    )
    if node.op_type not in OPERATORS:
        require(False, f"{label}: {_REFUSED.get(node.op_type, 'not an operator that can be served')}")
    training = node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]
    require(not training, f"{label}: random numbers")
    for attribute in node.attribute:
        name = f"{label}: attribute {short(attribute.name)}"
        require(attribute.type in _FIELDS, f"{name} is of a type that can't be served")
        given = {field.name for field, _ in attribute.ListFields()} - {"name", "type", "doc_string"}
        require(given <= {_FIELDS[attribute.type]}, f"{name} has values of several types")
        require(attribute.type != AttributeProto.GRAPH or node.op_type == "If", f"{name} holds a graph")
        if attribute.type == AttributeProto.TENSOR:
            _check_tensor(attribute.t, name)


def _check_tensor(tensor: TensorProto, name: str) -> None:
    width = ITEM_BYTES.get(tensor.data_type)
    require(width is not None, f"{name}: of a number format that can't be served")
    right = min(tensor.dims, default=0) >= 0 and len(tensor.raw_data) == (width or 0) * math.prod(tensor.dims)
    require(right, f"{name}: data of shape {short(list(tensor.dims))}, in the file itself, expected")


_FIELDS: dict[int, str] = {
    AttributeProto.FLOAT: "f",
    AttributeProto.INT: "i",
    AttributeProto.STRING: "s",
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.FLOATS: "floats",
    AttributeProto.INTS: "ints",
    AttributeProto.STRINGS: "strings",
}

DTYPES: dict[int, np.dtype[Any]] = {
    TensorProto.FLOAT: np.dtype("float32"),
    TensorProto.INT32: np.dtype("int32"),
    TensorProto.INT64: np.dtype("int64"),
    TensorProto.BOOL: np.dtype("bool"),
    TensorProto.DOUBLE: np.dtype("float64"),
}
"""Number formats of inputs and outputs, by data type."""
