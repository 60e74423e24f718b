"""Checks and lookups common to both APIs."""

from unroll_engine.arrays import FLOAT32
from unroll_engine.errors import InvalidRequestError, ModelNotFoundError, SequenceStateError
from unroll_engine.models.spec import ModelSpec
from unroll_proto.v1.unroll_pb2 import Snapshot
from unroll_server.repository.catalog import Catalog
from unroll_server.repository.version import LoadedVersion

MAX_ANSWER_BYTES = 2**28
"""Bytes of numbers in one answer to a batch; a message can't have more than eight times that."""


def resolve_model(
    catalog: Catalog, snapshot: Snapshot, name: str, version: int, field: str, model_field: str = "model"
) -> LoadedVersion:
    """The model that a request names; what it leaves open, the snapshot says.

    Args:
        catalog: The models.
        snapshot: As a caller sent it.
        name: The model that the request names; empty: none.
        version: Likewise; 0: none.
        field: Where the snapshot stands in the request.
        model_field: Where the model's name stands in it.

    Raises:
        ModelNotFoundError: what the request names is not served.
        SequenceStateError: what the snapshot is of is not served.
    """
    try:
        return catalog.find(name or snapshot.model, version or snapshot.version, model_field, resumes=snapshot.bundle)
    except ModelNotFoundError as error:
        if version or (name and error.field == model_field):
            raise
        theirs = f"{snapshot.model}/{snapshot.version} ({snapshot.architecture})"
        raise SequenceStateError(f"the snapshot is of {theirs}: {error.description}", field) from None


def check_answer(spec: ModelSpec, sequences: int, keeps_states: bool, field: str) -> None:
    """Checks that the answer to a batch is none that can't be sent.

    Args:
        spec: What is to run it.
        sequences: How many there are.
        keeps_states: Whether their states after the last steps are wanted.
        field: What of the request says how many.

    Raises:
        InvalidRequestError: it would be too large.
    """
    state = sum(layers * size for layers, size in spec.state_shapes) if keeps_states else 0
    size = sequences * (2 * spec.output_size + state) * FLOAT32.itemsize
    if size > MAX_ANSWER_BYTES:
        problem = f"{sequences} sequences make an answer of {size} bytes, at most {MAX_ANSWER_BYTES} allowed"
        raise InvalidRequestError(problem, field)
