"""The model that resumes from a snapshot, by the names in the request and in the snapshot."""

import pytest
from support.models import random_network, served

from unroll_engine.errors import ModelNotFoundError, RequestError, SequenceStateError
from unroll_proto.v1.unroll_pb2 import Snapshot
from unroll_server.api.data_plane import resolve_model
from unroll_server.repository.catalog import Catalog

NETWORK = random_network()
CATALOG = Catalog([served(NETWORK, name, version) for name, version in (("a", 1), ("a", 2), ("b", 1))])


@pytest.mark.parametrize(
    ("name", "version", "snapshot", "found"),
    [
        ("", 0, ("a", 1), ("a", 1)),
        ("a", 0, ("a", 1), ("a", 1)),
        ("a", 1, ("a", 1), ("a", 1)),
        # A snapshot of another model than the request's is refused when it is decoded.
        ("a", 2, ("a", 1), ("a", 2)),
        ("b", 0, ("a", 1), ("b", 1)),
    ],
)
def test_the_snapshot_names_what_the_request_leaves_open(
    name: str, version: int, snapshot: tuple[str, int], found: tuple[str, int]
) -> None:
    model = resolve_model(CATALOG, Snapshot(model=snapshot[0], version=snapshot[1]), name, version, "initial_state")
    assert model.spec.key == found


@pytest.mark.parametrize(
    ("name", "version", "snapshot", "error", "message"),
    [
        (
            "a",
            0,
            ("a", 7),
            SequenceStateError,
            "at: the snapshot is of a/7 (simple_rnn): a/7 is not served; choose from: 1, 2",
        ),
        (
            "",
            0,
            ("c", 1),
            SequenceStateError,
            "at: the snapshot is of c/1 (simple_rnn): 'c' is not served; choose from: a, b",
        ),
        (
            "b",
            0,
            ("a", 2),
            SequenceStateError,
            "at: the snapshot is of a/2 (simple_rnn): b/2 is not served; choose from: 1",
        ),
        # A model that the request itself names may be added later.
        ("a", 7, ("a", 7), ModelNotFoundError, "version: a/7 is not served; choose from: 1, 2"),
        ("c", 0, ("c", 1), ModelNotFoundError, "model: 'c' is not served; choose from: a, b"),
    ],
)
def test_a_snapshot_of_what_is_not_served_is_at_fault_unless_the_request_names_that_too(
    name: str, version: int, snapshot: tuple[str, int], error: type[RequestError], message: str
) -> None:
    given = Snapshot(model=snapshot[0], version=snapshot[1], architecture="simple_rnn")
    with pytest.raises(error) as raised:
        resolve_model(CATALOG, given, name, version, "at")
    assert str(raised.value).startswith(message)
