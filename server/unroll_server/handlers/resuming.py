"""Which model goes on from a snapshot."""

from unroll_engine.errors import ModelNotFoundError, SequenceStateError
from unroll_engine.models.loader import Model
from unroll_proto.v1.unroll_pb2 import Snapshot
from unroll_server.catalog import Catalog


def model_of(
    catalog: Catalog, snapshot: Snapshot, name: str, version: int, field: str, model_field: str = "model"
) -> Model:
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
