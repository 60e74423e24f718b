"""Tensors of the Open Inference Protocol: valid ones keep their values, others are refused."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.settings import SETTINGS

from unroll_engine.errors import InvalidRequestError
from unroll_engine.models.spec import Float32Array, ModelKey, ModelSpec
from unroll_proto.inference import service_pb2 as pb
from unroll_server.api.oip.signature import inputs_of
from unroll_server.api.oip.tensors import TYPED, decode, encode, encode_classes, initial_state, ragged
from unroll_server.config import Limits

LIMITS = SETTINGS.limits
SPEC = ModelSpec(ModelKey("m", 1), "simple_rnn", 2, 3, 4, 2, ("a", "b", "c", "d"), ("x", "y"))
VALUES = np.arange(24, dtype=np.float32).reshape(3, 4, 2)
LENGTHS = np.array([1, 4, 2], np.int32)
STATE = np.arange(18, dtype=np.float32).reshape(3, 2, 3)


def request_of(raw: bool = True, **arrays: Any) -> pb.ModelInferRequest:
    """Makes a request with the arrays as inputs, in order."""
    request = pb.ModelInferRequest(model_name="m")
    for name, array in arrays.items():
        datatype = {"i": "INT", "u": "UINT", "f": "FP"}[array.dtype.kind] + str(8 * array.dtype.itemsize)
        tensor = request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        if raw:
            request.raw_input_contents.append(array.tobytes())
        else:
            getattr(tensor.contents, TYPED[datatype]).extend(array.ravel().tolist())
    return request


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("integer", [np.int32, np.int64, np.uint32, np.uint64])
def test_raw_and_typed_contents_give_the_same_rows_end_to_end(raw: bool, integer: type[np.integer[Any]]) -> None:
    inputs = decode(request_of(raw, lengths=LENGTHS.astype(integer), initial_state=STATE, input=VALUES), SPEC, LIMITS)
    rows, offsets = ragged(inputs)
    np.testing.assert_array_equal(rows, np.concatenate([VALUES[0, :1], VALUES[1], VALUES[2, :2]]))
    np.testing.assert_array_equal(offsets, [0, 1, 5, 7])
    state = initial_state(inputs, SPEC)
    assert state is not None
    np.testing.assert_array_equal(state[0], STATE.transpose(1, 0, 2))
    assert rows.dtype == state[0].dtype == np.float32


def test_without_lengths_every_row_counts_and_nothing_is_copied() -> None:
    request = request_of(input=VALUES)
    rows, offsets = ragged(decode(request, SPEC, LIMITS))
    np.testing.assert_array_equal(rows, VALUES.reshape(12, 2))
    np.testing.assert_array_equal(offsets, [0, 4, 8, 12])
    assert not rows.flags.owndata
    assert initial_state(decode(request, SPEC, LIMITS), SPEC) is None


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    filler=st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e38]),
    spare=st.integers(0, 3),
)
def test_padding_changes_nothing(lengths: list[int], filler: float, spare: int) -> None:
    sequences = [np.full((length, 2), index + 0.5, np.float32) for index, length in enumerate(lengths)]
    values = np.full((len(lengths), max(lengths) + spare, 2), filler, np.float32)
    for row, sequence in zip(values, sequences, strict=True):
        row[: len(sequence)] = sequence
    rows, offsets = ragged(decode(request_of(input=values, lengths=np.array(lengths, np.int32)), SPEC, LIMITS))
    np.testing.assert_array_equal(rows, np.concatenate(sequences))
    np.testing.assert_array_equal(np.diff(offsets), lengths)


def _without(field: str, request: pb.ModelInferRequest) -> pb.ModelInferRequest:
    request.ClearField(field)  # type: ignore[arg-type]  # any field's name
    return request


def _with_tensor(request: pb.ModelInferRequest, **changes: Any) -> pb.ModelInferRequest:
    for name, value in changes.items():
        if name == "shape":
            request.inputs[0].ClearField("shape")
            request.inputs[0].shape.extend(value)
        else:
            setattr(request.inputs[0], name, value)
    return request


def _mixed() -> pb.ModelInferRequest:
    request = request_of(input=VALUES, lengths=LENGTHS)
    request.inputs[1].contents.int_contents.extend([1, 1, 1])
    return request


def _two_types() -> pb.ModelInferRequest:
    request = request_of(raw=False, input=VALUES)
    request.inputs[0].contents.fp64_contents.append(1.0)
    return request


def _with_parameter(name: str, raw: bool = True, **value: Any) -> pb.ModelInferRequest:
    request = request_of(raw, input=VALUES)
    request.inputs[0].parameters[name].CopyFrom(pb.InferParameter(**value))
    return request


@pytest.mark.parametrize(
    ("request_", "part"),
    [
        (pb.ModelInferRequest(), "`input` is missing"),
        (request_of(lengths=LENGTHS), "`input` is missing"),
        (request_of(input=VALUES, other=VALUES), "no input 'other'"),
        (_with_tensor(request_of(input=VALUES), datatype="FP64"), "`input` is FP32, not 'FP64'"),
        (_with_tensor(request_of(input=VALUES), datatype=""), "`input` is FP32, not ''"),
        (request_of(input=VALUES[0]), "3 dimensions expected"),
        (_with_tensor(request_of(input=VALUES), shape=[3, -4, -2]), "none below 0"),
        (_with_tensor(request_of(input=VALUES), shape=[2**40, 2**40, 0]), "2^31"),
        (_with_tensor(request_of(input=VALUES), shape=[3, 4, 3]), "96 bytes, 144 expected"),
        (_with_tensor(request_of(raw=False, input=VALUES), shape=[3, 4, 3]), "24 elements, 36 expected"),
        (request_of(raw=False, input=VALUES[:0]), "holds 0 sequences"),
        (request_of(input=VALUES[:, :0]), "holds 0 timesteps"),
        (request_of(input=VALUES, lengths=LENGTHS[:2]), "`lengths` is for 2 sequences"),
        (request_of(input=VALUES, initial_state=STATE[:1]), "`initial_state` is for 1 sequences"),
        (request_of(input=VALUES, lengths=LENGTHS - 1), "`lengths` gives 0 for sequence 0"),
        (request_of(input=VALUES, lengths=LENGTHS + 1), "`lengths` gives 5 for sequence 1"),
        (request_of(input=VALUES, lengths=LENGTHS - np.int64(2**40)), f"`lengths` gives {1 - 2**40} for sequence 0"),
        (
            request_of(input=VALUES, lengths=LENGTHS.astype(np.uint64) + np.uint64(2**64 - 4)),
            f"`lengths` gives {2**64 - 3} for sequence 0",
        ),
        (
            request_of(input=VALUES, lengths=LENGTHS.astype(np.float32)),
            "`lengths` is INT32 or INT64 or UINT32 or UINT64, not 'FP32'",
        ),
        (_without("raw_input_contents", request_of(input=VALUES)), "0 elements, 24 expected"),
        (pb.ModelInferRequest(inputs=request_of(input=VALUES).inputs, raw_input_contents=[b"", b""]), "2 given"),
        (_mixed(), "give either, for all inputs"),
        (_two_types(), "not in fp64_contents"),
        (_with_parameter("shared_memory_region", string_param="region"), "shared memory is not supported"),
        (_with_parameter("scale", double_param=2.0), "inputs[0].parameters[scale]: unknown; an input takes"),
        (_with_parameter("content_type", string_param="pd"), "inputs[0].parameters[content_type]: 'pd', 'np'"),
        (_with_parameter("content_type", bool_param=True), "'np' in string_param expected"),
        (_with_parameter("binary_data_size", int64_param=95), "95, and raw_input_contents has 96 bytes"),
        (_with_parameter("binary_data_size", raw=False, int64_param=96), "inputs[0].parameters[binary_data_size]"),
    ],
)
def test_the_error_names_the_problem(request_: pb.ModelInferRequest, part: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decode(request_, SPEC, LIMITS)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "request_",
    [
        _with_parameter("content_type", string_param="np"),
        _with_parameter("content_type", raw=False, string_param="np"),
        _with_parameter("binary_data_size", int64_param=VALUES.nbytes),
    ],
)
def test_parameters_that_kserve_and_mlserver_clients_add_are_accepted(request_: pb.ModelInferRequest) -> None:
    np.testing.assert_array_equal(decode(request_, SPEC, LIMITS).values, VALUES)


def test_empty_contents_beside_raw_ones_are_ignored() -> None:
    request = request_of(input=VALUES)
    request.inputs[0].contents.SetInParent()
    assert request.inputs[0].HasField("contents")
    np.testing.assert_array_equal(decode(request, SPEC, LIMITS).values, VALUES)


def test_an_input_given_twice_is_refused() -> None:
    request = request_of(input=VALUES)
    request.inputs.append(request.inputs[0])
    request.raw_input_contents.append(request.raw_input_contents[0])
    with pytest.raises(InvalidRequestError, match="given twice"):
        decode(request, SPEC, LIMITS)


@pytest.mark.parametrize(
    ("arrays", "part"),
    [
        ({"input": VALUES[:, :, :1]}, "`input` has 1 features, m/1 takes 2"),
        ({"input": np.where(VALUES == 13, np.nan, VALUES)}, "sequence 1, step 2, feature 1 is not finite"),
        ({"input": VALUES, "initial_state": STATE[:, :1]}, r"`initial_state` is [3, 1, 3], m/1 takes [3, 2, 3]"),
        (
            {"input": VALUES, "initial_state": np.full_like(STATE, np.inf)},
            "`initial_state` holds a value that is not finite",
        ),
    ],
)
def test_the_error_names_what_does_not_fit_the_model(arrays: dict[str, Any], part: str) -> None:
    request = request_of(**{name: array.astype(np.float32) for name, array in arrays.items()})

    def read() -> None:
        inputs = decode(request, SPEC, LIMITS)
        ragged(inputs)
        initial_state(inputs, SPEC)

    with pytest.raises(InvalidRequestError) as caught:
        read()
    assert part in str(caught.value)


def test_limits_hold_before_anything_is_computed() -> None:
    tight = Limits(max_sequences=2, max_steps=3, max_open_sequences=1, max_message_bytes=1)
    with pytest.raises(InvalidRequestError, match="3 sequences, 1 to 2 allowed"):
        decode(request_of(input=VALUES), SPEC, tight)
    with pytest.raises(InvalidRequestError, match="4 timesteps a sequence, 1 to 3 allowed"):
        decode(request_of(input=VALUES[:2]), SPEC, tight)


_DIMENSIONS = st.one_of(st.integers(-2, 4), st.sampled_from([2**31, 2**62, -(2**63), 2**63 - 1]))
_FLOATS = st.lists(st.floats(width=32), max_size=24)


@st.composite
def _requests(draw: st.DrawFn) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest()
    for _ in range(draw(st.integers(0, 4))):
        tensor = request.inputs.add(
            name=draw(st.sampled_from([*(each.name for each in inputs_of(SPEC)), "", "other"])),
            datatype=draw(st.sampled_from(["FP32", "INT32", "FP64", ""])),
            shape=draw(st.lists(_DIMENSIONS, max_size=4)),
        )
        if draw(st.booleans()):
            tensor.contents.fp32_contents.extend(draw(_FLOATS))
        if draw(st.integers(0, 3)) == 0:
            tensor.contents.int_contents.extend(draw(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4)))
    request.raw_input_contents.extend(draw(st.lists(st.binary(max_size=96), max_size=4)))
    return request


@given(request=_requests(), shortest=st.integers(0, 1))
def test_a_bad_request_is_refused_without_another_error(request: pb.ModelInferRequest, shortest: int) -> None:
    try:
        inputs = decode(request, SPEC, LIMITS, shortest)
        rows, offsets = ragged(inputs)
        initial_state(inputs, SPEC)
    except InvalidRequestError as error:
        refusal = error
    else:
        assert np.isfinite(rows).all()
        assert offsets[0] == 0
        assert offsets[-1] == len(rows)
        return
    assert refusal.field
    assert len(str(refusal)) < 500


def _elements(raw: bytes) -> list[str]:
    texts = []
    while raw:
        size = int.from_bytes(raw[:4], "little")
        texts.append(raw[4 : 4 + size].decode())
        raw = raw[4 + size :]
    return texts


def test_classes_come_largest_first_with_index_and_label() -> None:
    response = pb.ModelInferResponse()
    array = np.array([[0.25, 0.5, 0.125, 0.5], [1.0, -2.0, 0.0, 3.5]], np.float32)
    encode_classes(response, "logits", array, 3, ("a", "b", "c", "ä:d"))
    (output,) = response.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("logits", "BYTES", [2, 3])
    assert _elements(response.raw_output_contents[0]) == [
        "0.500000:1:b",
        "0.500000:3:ä:d",
        "0.250000:0:a",
        "3.500000:3:ä:d",
        "1.000000:0:a",
        "0.000000:2:c",
    ]


def test_more_classes_than_there_are_is_all_of_them() -> None:
    response = pb.ModelInferResponse()
    encode_classes(response, "logits", np.zeros((1, 4), np.float32), 2**62, SPEC.class_labels)
    assert list(response.outputs[0].shape) == [1, 4]


def test_an_output_s_bytes_are_those_of_the_array_in_row_major_order() -> None:
    response = pb.ModelInferResponse()
    array: Float32Array = STATE.transpose(1, 0, 2)
    encode(response, "final_state", array)
    assert list(response.outputs[0].shape) == [2, 3, 3]
    assert response.raw_output_contents[0] == np.ascontiguousarray(array).tobytes()
