"""Names and shapes of the inputs and outputs of model artifacts."""

from collections.abc import Mapping
from typing import Any

from unroll_engine.models.spec import STATES as STATE_NAMES
from unroll_export.model import RecurrentClassifier
from unroll_proto.v1 import bundle_pb2 as pb

INPUT = "input"
LOGITS = "logits"
STATES = "states"

BATCH = "batch"
TIME = "time"

Shape = tuple[str | int, ...]


def state_names(model: RecurrentClassifier[Any]) -> tuple[str, ...]:
    """Returns the names of the state tensors: `initial_NAME` is an input, `final_NAME` an output."""
    return STATE_NAMES[model.architecture]


def input_shapes(model: RecurrentClassifier[Any]) -> dict[str, Shape]:
    """Returns the shapes of the inputs by name, in order; BATCH and TIME stand for the dynamic dimensions."""
    return {INPUT: (BATCH, TIME, model.rnn.input_size)} | _state_shapes(model, "initial")


def output_shapes(model: RecurrentClassifier[Any]) -> dict[str, Shape]:
    """Returns the shapes of the outputs by name, in order; BATCH and TIME stand for the dynamic dimensions."""
    shapes: dict[str, Shape] = {
        LOGITS: (BATCH, TIME, model.fc.out_features),
        STATES: (BATCH, TIME, model.rnn.hidden_size),
    }
    return shapes | _state_shapes(model, "final")


def _state_shapes(model: RecurrentClassifier[Any], when: str) -> dict[str, Shape]:
    rnn = model.rnn
    return {f"{when}_{name}": (rnn.num_layers, BATCH, rnn.hidden_size) for name in state_names(model)}


def specs(shapes: Mapping[str, Shape]) -> list[pb.TensorSpec]:
    """Returns the shapes for a manifest; every tensor is float32."""
    return [
        pb.TensorSpec(name=name, dtype="float32", shape=[str(size) for size in shape]) for name, shape in shapes.items()
    ]
