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


def input_shapes(model: SimpleRNN, time_major: bool) -> dict[str, Shape]:
    """Shapes of the inputs by name, in order; BATCH and TIME stand for the dynamic dimensions."""
    lead = (TIME, BATCH) if time_major else (BATCH, TIME)
    rnn = model.rnn
    return {INPUT: (*lead, rnn.input_size), INITIAL_STATE: (rnn.num_layers, BATCH, rnn.hidden_size)}


def output_shapes(model: SimpleRNN, time_major: bool) -> dict[str, Shape]:
    """Shapes of the outputs by name, in order; BATCH and TIME stand for the dynamic dimensions."""
    lead = (TIME, BATCH) if time_major else (BATCH, TIME)
    rnn = model.rnn
    return {
        LOGITS: (*lead, model.fc.out_features),
        STATES: (*lead, rnn.hidden_size),
        FINAL_STATE: (rnn.num_layers, BATCH, rnn.hidden_size),
    }


def specs(shapes: Mapping[str, Shape]) -> list[pb.TensorSpec]:
    """The shapes as a manifest states them; every tensor is float32."""
    return [
        pb.TensorSpec(name=name, dtype="float32", shape=[str(size) for size in shape]) for name, shape in shapes.items()
    ]
