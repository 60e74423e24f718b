"""Ragged packing: any numeric arrays in, float32 of the wire out, and an error that names the sequence."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from unroll_client import InvalidArgument
from unroll_client._arrays import pack, pack_chunk

DTYPES = ["float64", "float32", "float16", "int64", "uint8", "bool", ">f4", ">f8"]


@settings(deadline=None)
@given(st.data())
def test_any_numeric_dtype_order_and_stride_is_packed(data: st.DataObject) -> None:
    features = data.draw(st.integers(1, 4))
    arrays: list[NDArray[Any]] = []
    for _ in range(data.draw(st.integers(1, 5))):
        dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
        shape = (data.draw(st.integers(1, 6)), features)
        elements = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else None
        array = data.draw(hnp.arrays(dtype, shape, elements=elements and st.floats(-1e4, 1e4, width=16)))
        arrays.append(data.draw(st.sampled_from([array, np.asfortranarray(array), array[::-1], array[::2]])))
    ragged = pack(arrays)
    assert ragged.lengths == [len(array) for array in arrays]
    assert ragged.features == features
    expected = np.concatenate([array.astype("<f4") for array in arrays])
    assert ragged.values == expected.tobytes()


def test_lists_are_arrays_too() -> None:
    ragged = pack([[[1, 2], [3, 4]], [[5.5, 6]]])
    assert np.frombuffer(ragged.values, "<f4").tolist() == [1, 2, 3, 4, 5.5, 6]


def test_no_sequences() -> None:
    assert len(pack([]).lengths) == 0


GOOD = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (np.ones(3), "an array [steps, features] expected, got shape [3]; one feature is [steps, 1]"),
        (np.ones((2, 3, 1)), "an array [steps, features] expected, got shape [2, 3, 1]"),
        (7, "an array [steps, features] expected, got shape []"),
        ([[1, 2, 3], [4, 5]], "an array [steps, features] expected, got rows of unequal lengths"),
        (np.ones((0, 3)), "1 step and 1 feature or more expected, got shape [0, 3]"),
        (np.ones((2, 0)), "1 step and 1 feature or more expected, got shape [2, 0]"),
        (np.ones((2, 4)), "4 features, 3 expected as in sequences[0]"),
        (np.full((2, 3), "x"), "numbers expected, got dtype <U1"),
        (np.full((2, 3), None), "numbers expected, got dtype object"),
        (np.ones((2, 3), complex), "numbers expected, got dtype complex128"),
        (np.where(np.eye(2, 3, 1), np.nan, 1), "[0][1] is no finite float32"),
        (np.where(np.eye(2, 3, 1), -np.inf, 1), "[0][1] is no finite float32"),
        (np.where(np.eye(2, 3, 1), 1e39, 1), "[0][1] is no finite float32"),
    ],
)
def test_a_bad_sequence_is_named(bad: Any, what: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        pack([GOOD, GOOD, bad, GOOD])
    assert str(caught.value) == f"sequences[2]: {what}"
    assert [(field.field, field.description) for field in caught.value.fields] == [("sequences[2]", what)]
    assert isinstance(caught.value, ValueError)


def test_finite_values_whose_sum_is_not_are_good() -> None:
    large = np.full((4, 2), 3e38, np.float32)
    assert pack([large, -large]).values == np.concatenate([large, -large]).tobytes()


@pytest.mark.parametrize("bad", [np.ones(3), np.ones((1, 4)), np.ones((0, 3)), [[1, 2, np.nan]], [["a", "b", "c"]]])
def test_a_bad_chunk(bad: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^chunk: "):
        pack_chunk(bad, 3)


def test_a_chunk_is_contiguous_float32() -> None:
    chunk = pack_chunk(np.arange(12).reshape(3, 4).T, 3)
    assert chunk.dtype == np.float32
    assert chunk.flags.c_contiguous
    assert chunk.tolist() == np.arange(12).reshape(3, 4).T.tolist()
