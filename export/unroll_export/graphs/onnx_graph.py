"""A thin builder over onnx.helper: collects nodes and initializers, then makes a checked, serialized model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import ArrayLike
from onnx import TensorProto, helper, numpy_helper

from unroll_export.graphs.tensors import Shape
from unroll_export.model import RecurrentClassifier

# Old enough for every runtime of recent years; a newer one would bring no gain.
OPSET = 17
IR_VERSION = 8


class GraphBuilder:
    """Nodes and initializers of one ONNX graph, in order."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []

    def weight(self, name: str, value: torch.Tensor) -> str:
        """Adds a float32 initializer and returns its name."""
        array = np.ascontiguousarray(value.detach().numpy(), dtype=np.float32)
        self._initializers.append(numpy_helper.from_array(array, name))
        return name

    def integers(self, name: str, value: ArrayLike) -> str:
        """Adds an int64 initializer (axes, indices, sizes) and returns its name."""
        self._initializers.append(numpy_helper.from_array(np.asarray(value, dtype=np.int64), name))
        return name

    def node(self, op: str, inputs: Sequence[str], outputs: str | Sequence[str], **attributes: Any) -> str:
        """Adds a node of the standard operator `op`, named after its first output, and returns that output."""
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        self._nodes.append(helper.make_node(op, inputs, names, name=names[0], **attributes))
        return names[0]

    def graph(self, name: str, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> onnx.GraphProto:
        """Makes the graph of all additions, with float32 inputs and outputs."""
        return helper.make_graph(
            self._nodes, name, _value_infos(inputs), _value_infos(outputs), initializer=self._initializers
        )


def serialize(graph: onnx.GraphProto, model: RecurrentClassifier[Any], layout: str) -> bytes:
    """Makes a model of `graph`, checks it in full, and serializes it; equal graphs give equal bytes.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: the graph is not valid ONNX.
    """
    proto = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="unroll-export",
        doc_string=graph.doc_string,
    )
    rnn = model.rnn
    sizes = {
        "input_size": rnn.input_size,
        "hidden_size": rnn.hidden_size,
        "output_size": model.fc.out_features,
        "num_layers": rnn.num_layers,
    }
    properties = {"architecture": model.architecture, "layout": layout}
    helper.set_model_props(proto, properties | {name: str(size) for name, size in sizes.items()})
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString(deterministic=True)


def _value_infos(shapes: Mapping[str, Shape]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
