"""Names and shapes of what goes into a model artifact and what comes out."""

from collections.abc import Mapping

from unroll_export.model import SimpleRNN
from unroll_proto.v1 import bundle_pb2 as pb

INPUT = "input"
INITIAL_STATE = "initial_state"
LOGITS = "logits"
STATES = "states"
FINAL_STATE = "final_state"

INPUTS = (INPUT, INITIAL_STATE)
OUTPUTS = (LOGITS, STATES, FINAL_STATE)

BATCH = "batch"
TIME = "time"

Shape = tuple[str | int, ...]


def input_shapes(model: SimpleRNN) -> dict[str, Shape]:
    """Shapes of the inputs by name, in order; BATCH and TIME stand for the dynamic dimensions."""
    rnn = model.rnn
    return {INPUT: (BATCH, TIME, rnn.input_size), INITIAL_STATE: (rnn.num_layers, BATCH, rnn.hidden_size)}


def output_shapes(model: SimpleRNN) -> dict[str, Shape]:
    """Shapes of the outputs by name, in order; BATCH and TIME stand for the dynamic dimensions."""
    rnn = model.rnn
    return {
        LOGITS: (BATCH, TIME, model.fc.out_features),
        STATES: (BATCH, TIME, rnn.hidden_size),
        FINAL_STATE: (rnn.num_layers, BATCH, rnn.hidden_size),
    }


def specs(shapes: Mapping[str, Shape]) -> list[pb.TensorSpec]:
    """The shapes as a manifest states them; every tensor is float32."""
    return [
        pb.TensorSpec(name=name, dtype="float32", shape=[str(size) for size in shape]) for name, shape in shapes.items()
    ]
