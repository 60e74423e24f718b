"""Classify requests, chunks and snapshots: valid ones keep their values, errors name the field and the limit."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from support.models import random_network, served

from unroll_engine.arrays import to_bytes
from unroll_engine.errors import InvalidRequestError, SequenceStateError
from unroll_engine.models.spec import Float32Array
from unroll_engine.readout import classify
from unroll_engine.snapshots import MAX_STEP, decode_snapshot, encode_snapshot
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server.api.data_plane import decode_chunk
from unroll_server.api.native.service import decode_batch, encode_batch
from unroll_server.config import Limits

MODEL = served(random_network(features=3, hidden=8, outputs=4, layers=2))
SPEC = MODEL.spec
LIMITS = Limits(max_sequences=5, max_steps=10, max_open_sequences=2, max_message_bytes=2**20)


def request_of(lengths: list[int], values: Float32Array | None = None, **more: Any) -> pb.ClassifyRequest:
    if values is None:
        values = np.arange(sum(lengths) * SPEC.input_size, dtype=np.float32)
    return pb.ClassifyRequest(model="m", lengths=lengths, values=values.tobytes(), **more)


async def test_a_good_request_becomes_a_job_with_the_same_values() -> None:
    batch = decode_batch(request_of([2, 3, 1], return_final_states=True), MODEL, LIMITS)
    assert batch.offsets.tolist() == [0, 2, 5, 6]
    assert batch.values.shape == (6, 3)
    assert batch.values.ravel().tolist() == list(range(18))
    assert batch.keeps_states


@pytest.mark.parametrize(
    ("request_", "field", "says"),
    [
        (request_of([]), "lengths", "0 sequences, 1 to 5"),
        (request_of([1] * 6), "lengths", "6 sequences, 1 to 5"),
        (request_of([1, 0, 2]), "lengths[1]", "0 timesteps, 1 to 10"),
        (request_of([1, 11]), "lengths[1]", "11 timesteps, 1 to 10"),
        (pb.ClassifyRequest(lengths=[2**32 - 1]), "lengths[0]", "4294967295 timesteps"),
        (pb.ClassifyRequest(lengths=[2], values=b"\0" * 23), "values", "23 bytes, 24 expected"),
        (pb.ClassifyRequest(lengths=[2], values=b"\0" * 16), "values", "2 timesteps of 3 float32"),
        (request_of([1, 2], initial_states=[pb.Snapshot()]), "initial_states", "1 given, none or 2"),
    ],
)
async def test_a_wrong_request_names_field_and_limit(request_: pb.ClassifyRequest, field: str, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says) as caught:
        decode_batch(request_, MODEL, LIMITS)
    assert caught.value.field == field


async def test_an_answer_that_would_be_too_large_is_refused_before_it_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of a sequence: logits and probabilities of 4 classes, and 2 layers of 8.
    monkeypatch.setattr("unroll_server.api.data_plane.MAX_ANSWER_BYTES", 3 * 4 * (2 * 4 + 2 * 8))
    assert decode_batch(request_of([1] * 3, return_final_states=True), MODEL, LIMITS).keeps_states
    assert decode_batch(request_of([1] * 5), MODEL, LIMITS).size == 5
    with pytest.raises(InvalidRequestError, match="4 sequences make an answer of 384 bytes, at most 288") as caught:
        decode_batch(request_of([1] * 4, return_final_states=True), MODEL, LIMITS)
    assert caught.value.field == "lengths"


@given(st.lists(st.integers(1, 10), min_size=1, max_size=5), st.data())
def test_the_error_locates_a_value_that_is_not_finite(lengths: list[int], data: st.DataObject) -> None:
    values = np.zeros((sum(lengths), SPEC.input_size), np.float32)
    sequence = data.draw(st.integers(0, len(lengths) - 1))
    step = data.draw(st.integers(0, lengths[sequence] - 1))
    feature = data.draw(st.integers(0, SPEC.input_size - 1))
    values[sum(lengths[:sequence]) + step, feature] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    with pytest.raises(InvalidRequestError) as caught:
        decode_batch(request_of(lengths, values), MODEL, LIMITS)
    assert caught.value.description == f"sequence {sequence}, step {step}, feature {feature} is not finite"


@pytest.mark.parametrize(
    ("size", "says"), [(0, "0 bytes, 1 to 10 timesteps of 12 bytes"), (13, "13 bytes"), (132, "132 bytes, 1 to 10")]
)
def test_a_wrong_chunk_names_the_limit(size: int, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        decode_chunk(bytes(size), SPEC, LIMITS, "chunk.values")


def test_a_chunk_with_nan_is_refused() -> None:
    values = np.zeros((4, 3), np.float32)
    values[2, 1] = np.nan
    with pytest.raises(InvalidRequestError, match="step 2 of the chunk, feature 1"):
        decode_chunk(values.tobytes(), SPEC, LIMITS, "chunk.values")


@given(npst.arrays(np.float32, (2, 8), elements=st.floats(-1, 1, width=32)), st.integers(0, MAX_STEP))
def test_a_snapshot_comes_back_with_its_bits(state: Float32Array, step: int) -> None:
    snapshot = pb.Snapshot.FromString(encode_snapshot(SPEC, step, (state,)).SerializeToString())
    assert snapshot.step == step
    (again,) = decode_snapshot(snapshot, SPEC, "state")
    assert again.tobytes() == state.tobytes()
    assert again.shape == state.shape


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"format": 2}, InvalidRequestError, "s.format: 2, 1 expected"),
        ({"step": 2**63}, InvalidRequestError, f"s.step: {2**63}, at most {MAX_STEP}"),
        ({"model": "other"}, SequenceStateError, r"of other/1 \(simple_rnn\), the request is for m/1 \(simple_rnn\)"),
        ({"version": 7}, SequenceStateError, "of m/7 .* for m/1"),
        ({"architecture": "lstm"}, SequenceStateError, r"m/1 \(lstm\)"),
        ({"bundle": b"A"}, SequenceStateError, "^s: .* of m/1 with bundle 41, served is m/1 with bundle 42$"),
        ({"state": []}, InvalidRequestError, "0 state tensors, 1 expected"),
        ({"state": [b"\0" * 4]}, InvalidRequestError, r"s.state\[0\]: 4 bytes, 64 expected: float32 \[2, 8\]"),
        ({"state": [np.full(16, np.nan, np.float32).tobytes()]}, InvalidRequestError, "not finite"),
    ],
)
def test_a_wrong_snapshot_is_refused_by_name(change: dict[str, Any], error: type[Exception], says: str) -> None:
    spec = replace(SPEC, bundle=b"B")
    good = encode_snapshot(spec, 3, None)
    fields = {field.name: value for field, value in good.ListFields()}
    assert set(fields) == {"format", "model", "version", "architecture", "step", "state", "bundle"}
    with pytest.raises(error, match=says):
        decode_snapshot(pb.Snapshot(**{**fields, **change}), spec, "s")


def test_a_snapshot_without_a_bundle_is_accepted() -> None:
    old = encode_snapshot(SPEC, 3, None)
    assert not old.bundle
    assert len(decode_snapshot(old, replace(SPEC, bundle=b"B"), "s")) == 1


async def test_the_answer_counts_the_steps_of_a_sequence_from_its_beginning() -> None:
    # Without a format it is the zero state, whatever its other fields.
    begun = [encode_snapshot(SPEC, 40, None), pb.Snapshot(step=2**64 - 1)]
    request = request_of([2, 3], return_final_states=True, initial_states=begun)
    batch = decode_batch(request, MODEL, LIMITS)
    logits = np.array([[0, 3, 0, 0], [0, 0, 0, 5]], np.float32)
    state = (np.repeat(np.array([0, 0.5], np.float32), 2 * 8).reshape(2, 2, 8).transpose(1, 0, 2),)
    batch.logits, batch.final_state = logits, state
    batch.probabilities, batch.labels = classify(batch.logits)
    response = encode_batch(batch, request)
    assert [snapshot.step for snapshot in response.final_states] == [42, 3]
    for snapshot, value in zip(response.final_states, (0.0, 0.5), strict=True):
        assert np.frombuffer(snapshot.state[0], "<f4").tolist() == [value] * 16
    assert list(response.labels) == ["class 1", "class 3"]
    assert list(response.label_indices) == [1, 3]
    assert np.frombuffer(response.logits, "<f4").tolist() == batch.logits.ravel().tolist()
    assert to_bytes(batch.logits) == response.logits
