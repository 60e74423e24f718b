"""Any message is decoded, or refused as the caller's fault; a stream answers each one."""

import asyncio
import math
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st
from support import wire
from support.models import alone, random_network, served
from support.mutations import mutated
from support.streams import streamed
from support.values import random_values

from unroll_engine.errors import RequestError
from unroll_engine.snapshots import decode_snapshot, encode_snapshot
from unroll_proto.inference import service_pb2 as oip
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server.api.native.service import decode_batch
from unroll_server.api.oip import tensors
from unroll_server.config import Limits
from unroll_server.status import STATUS

MODEL = served(random_network())
SPEC = MODEL.spec
LIMITS = Limits(max_sequences=6, max_steps=9, max_open_sequences=3, max_message_bytes=2**20)
FAULTS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
}
"""Statuses that a message alone may be refused with."""

_floats = st.floats(width=32) | st.sampled_from([0.0, 1.0, math.nan, -math.inf])
_values = st.builds(wire.to_bytes, st.lists(_floats, max_size=40)) | st.builds(
    lambda steps: wire.to_bytes(np.linspace(-1, 1, steps * SPEC.input_size)), st.integers(0, 12)
)
_good_snapshots = st.builds(lambda step: encode_snapshot(SPEC, step, None), st.integers(0, 2**62) | st.just(0))
_snapshots = _good_snapshots | st.builds(
    pb.Snapshot,
    format=st.integers(0, 2),
    model=st.sampled_from(["m", "other", ""]),
    version=st.integers(0, 2),
    architecture=st.sampled_from(["simple_rnn", "lstm", ""]),
    step=st.integers(0, 2**64 - 1),
    state=st.lists(_values | st.just(bytes(4 * SPEC.hidden_size)), max_size=3),
)
_classify = st.builds(
    pb.ClassifyRequest,
    model=st.sampled_from(["m", "", "other"]),
    version=st.integers(0, 2),
    lengths=st.lists(st.integers(0, 12) | st.integers(0, 2**32 - 1), max_size=8),
    values=_values,
    initial_states=st.lists(_snapshots, max_size=3),
    return_final_states=st.booleans(),
)


def parsed(kind: Any, data: bytes) -> Any:
    """Parses the message; None if it is malformed, which the transport answers."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


def hold_to_be_the_caller_s(error: RequestError) -> None:
    assert STATUS[type(error)] in FAULTS
    assert str(error)


@given(mutated(_classify.map(pb.ClassifyRequest.SerializeToString)))
@example(pb.ClassifyRequest(lengths=[2**32 - 1] * 6).SerializeToString())
def test_any_classify_request_is_decoded_or_refused(data: bytes) -> None:
    request = parsed(pb.ClassifyRequest, data)
    if request is None:
        return

    async def decode() -> None:
        try:
            batch = decode_batch(request, MODEL, LIMITS)
        except RequestError as error:
            hold_to_be_the_caller_s(error)
        else:
            assert batch.size == len(request.lengths)
            assert batch.steps == sum(request.lengths)
            assert np.isfinite(batch.values).all()

    asyncio.run(decode())


@given(mutated(_snapshots.map(pb.Snapshot.SerializeToString)))
def test_any_snapshot_is_decoded_or_refused(data: bytes) -> None:
    snapshot = parsed(pb.Snapshot, data)
    if snapshot is None:
        return
    try:
        state = decode_snapshot(snapshot, SPEC, "snapshot")
    except RequestError as error:
        hold_to_be_the_caller_s(error)
    else:
        assert [array.shape for array in state] == [tensor.shape for tensor in SPEC.states]


_tensors = st.builds(
    oip.ModelInferRequest.InferInputTensor,
    name=st.sampled_from(["input", "lengths", "initial_state", "x", ""]),
    datatype=st.sampled_from(["FP32", "INT32", "INT64", "BYTES", ""]),
    shape=st.lists(st.integers(-1, 5) | st.sampled_from([2**31, 2**62, -(2**63)]), max_size=4),
    contents=st.builds(
        oip.InferTensorContents,
        fp32_contents=st.lists(_floats, max_size=20),
        int_contents=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4),
    ),
)
_infer = st.builds(
    oip.ModelInferRequest,
    model_name=st.sampled_from(["m", ""]),
    inputs=st.lists(_tensors, max_size=3),
    raw_input_contents=st.lists(_values, max_size=3),
)


@given(mutated(_infer.map(oip.ModelInferRequest.SerializeToString)))
def test_any_tensors_are_decoded_or_refused(data: bytes) -> None:
    request = parsed(oip.ModelInferRequest, data)
    if request is None:
        return
    try:
        inputs = tensors.decode(request, SPEC, LIMITS)
        values, offsets = tensors.ragged(inputs)
        state = tensors.initial_state(inputs, SPEC)
    except RequestError as error:
        hold_to_be_the_caller_s(error)
    else:
        assert len(values) == offsets[-1]
        assert np.isfinite(values).all()
        assert state is None or all(array.shape[1] == len(offsets) - 1 for array in state)


_keys = st.sampled_from(["a", "b", "c", "d", "", "x" * 200])
_messages = st.one_of(
    st.builds(
        pb.UnrollRequest,
        key=_keys,
        open=st.builds(
            pb.OpenSequence,
            model=st.sampled_from(["m", "", "other"]),
            version=st.integers(0, 2),
            initial_state=st.none() | _snapshots,
            return_states=st.booleans(),
            return_logits=st.booleans(),
            every=st.integers(0, 5) | st.just(2**32 - 1),
        ),
    ),
    st.builds(
        pb.UnrollRequest,
        key=_keys,
        chunk=st.builds(pb.Chunk, first_step=st.integers(0, 12) | st.integers(0, 2**64 - 1), values=_values),
    ),
    st.builds(
        pb.UnrollRequest,
        chunks=st.builds(
            pb.ChunkBatch,
            keys=st.lists(_keys, max_size=4),
            first_steps=st.lists(st.integers(0, 12), max_size=4),
            values=st.lists(_values, max_size=4),
        ),
    ),
    st.builds(pb.UnrollRequest, key=_keys, take_snapshot=st.just(pb.TakeSnapshot())),
    st.builds(pb.UnrollRequest, key=_keys, close=st.just(pb.CloseSequence())),
    st.builds(pb.UnrollRequest, key=_keys),
)


def keys_of(request: pb.UnrollRequest) -> list[str]:
    """Returns the keys of the answers to a message."""
    chunks = request.chunks
    counts = {len(chunks.keys), len(chunks.first_steps), len(chunks.values)}
    if not request.HasField("chunks") or len(counts) > 1 or not 1 <= len(chunks.keys) <= LIMITS.max_open_sequences:
        return [request.key]
    return list(chunks.keys)


@given(st.lists(mutated(_messages.map(pb.UnrollRequest.SerializeToString)), max_size=12))
def test_a_stream_answers_every_message_and_a_good_sequence_beside_them(pieces: list[bytes]) -> None:
    values = random_values(7, features=SPEC.input_size)
    good = [
        wire.open_request("good", "m"),
        wire.chunk_request("good", 0, values[:4]),
        wire.chunk_request("good", 4, values[4:]),
        wire.close_request("good"),
    ]
    bad = [request for piece in pieces if (request := parsed(pb.UnrollRequest, piece)) is not None]
    longer = range(max(len(good), len(bad)))
    requests = [request for index in longer for request in bad[index : index + 1] + good[index : index + 1]]
    responses = asyncio.run(streamed([MODEL], LIMITS, requests))
    asked_of = [key for request in requests for key in keys_of(request)]
    for key in asked_of:
        asked = [each for each in asked_of if each == key]
        heard = [response for response in responses if key == response.key or key in response.steps_batch.keys]
        # A chunk may have several answers, other messages have one.
        assert len(heard) >= len(asked)
        for response in heard:
            if response.HasField("error"):
                assert response.error.code in {status.value[0] for status in FAULTS}
                assert response.error.message
    if all("good" not in keys_of(request) for request in bad):
        logits, states, final = alone(MODEL, values, None)
        steps = wire.steps_of(responses, "good")
        assert b"".join(part.states for part in steps) == states.tobytes()
        assert b"".join(part.logits for part in steps) == logits.tobytes()
        (closed,) = (
            response.closed for response in responses if response.HasField("closed") and response.key == "good"
        )
        assert closed.snapshot == encode_snapshot(SPEC, len(values), final)
