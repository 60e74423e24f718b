"""Packing: any numeric arrays in, float32 of the wire out, and an error that names the sequence."""

import array
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from support.servicers import PartialServicer, zero_answer
from unit.client.harness import ScriptedServer

from unroll_client import Client, InvalidArgument
from unroll_proto.v1 import unroll_pb2 as pb


class Recording(PartialServicer):
    """Records the values that it is sent."""

    def __init__(self) -> None:
        self.classified = pb.ClassifyRequest()
        self.advanced = pb.AdvanceRequest()

    async def GetModel(self, request: Any, context: Any) -> pb.GetModelResponse:  # noqa: N802
        return pb.GetModelResponse(model=pb.Model(name="m", version=1, output_size=1, class_labels=["a"]))

    async def ListModels(self, request: Any, context: Any) -> pb.ListModelsResponse:  # noqa: N802
        return pb.ListModelsResponse()

    async def Classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:  # noqa: N802
        self.classified = request
        return zero_answer(["a"] * len(request.lengths), classes=1)

    async def Advance(self, request: pb.AdvanceRequest, context: Any) -> pb.AdvanceResponse:  # noqa: N802
        self.advanced = request
        return pb.AdvanceResponse()


class Packing:
    """Packs values by a client, and returns the message that the server received."""

    def __init__(self) -> None:
        self._servicer = Recording()
        self._server = ScriptedServer(self._servicer)
        self._client = Client(self._server.address)

    def batch(self, sequences: Any) -> pb.ClassifyRequest:
        self._client.classify(sequences)
        return self._servicer.classified

    def chunk(self, values: Any) -> bytes:
        self._client.advance("s", values, start=True, states=False)
        return self._servicer.advanced.values

    def close(self) -> None:
        self._client.close()
        self._server.stop()


@pytest.fixture(scope="module")
def packing() -> Iterator[Packing]:
    packing = Packing()
    yield packing
    packing.close()


DTYPES = ["float64", "float32", "float16", "int64", "uint8", "bool", ">f4", ">f8"]


@given(data=st.data())
def test_any_numeric_dtype_order_and_stride_is_packed(packing: Packing, data: st.DataObject) -> None:
    features = data.draw(st.integers(1, 4))
    arrays: list[NDArray[Any]] = []
    for _ in range(data.draw(st.integers(1, 5))):
        dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
        shape = (data.draw(st.integers(1, 6)), features)
        elements = {"f": st.floats(-1e4, 1e4, width=16), "i": st.integers(-(2**24), 2**24)}.get(dtype.kind)
        array = data.draw(hnp.arrays(dtype, shape, elements=elements))
        arrays.append(data.draw(st.sampled_from([array, np.asfortranarray(array), array[::-1], array[::2]])))
    request = packing.batch(arrays)
    assert request.lengths == [len(array) for array in arrays]
    expected = np.concatenate([array.astype("<f4") for array in arrays])
    assert request.values == expected.tobytes()


def test_lists_are_arrays_too(packing: Packing) -> None:
    request = packing.batch([[[1, 2], [3, 4]], [[5.5, 6]]])
    assert np.frombuffer(request.values, "<f4").tolist() == [1, 2, 3, 4, 5.5, 6]


GOOD = np.ones((2, 3), np.float32)
INEXACT = "[{}][{}] is {}, which float32 can't hold; where rounding does no harm, make it a float"


class OfArray:
    """An array of a library with `__array__`, which can fail."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __array__(self, dtype: object = None, copy: object = None) -> NDArray[Any]:
        if isinstance(self.value, Exception):
            raise self.value
        return np.asarray(self.value)


class OfDLPack:
    """An array of a library with only DLPack."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


@pytest.mark.parametrize(
    "make",
    [
        torch.from_numpy,
        lambda values: torch.from_numpy(values).requires_grad_(),
        lambda values: torch.nn.Parameter(torch.from_numpy(values)),
        lambda values: torch.from_numpy(values).bfloat16(),
        lambda values: torch.from_numpy(values).to(torch.float8_e4m3fn),
        lambda values: torch.from_numpy(values).to(torch.int64),
        lambda values: torch.from_numpy(values.T.copy()).T,
        lambda values: list(torch.from_numpy(values)),
        lambda values: values.astype(ml_dtypes.bfloat16),
        lambda values: values.astype(np.longdouble),
        lambda values: np.ma.masked_equal(values, 99),
        lambda values: pa.table(dict(zip("abc", values.T.copy(), strict=True))),
        lambda values: memoryview(values.astype(">f8")),
        OfArray,
        OfDLPack,
    ],
)
def test_arrays_of_all_kinds_are_taken(packing: Packing, make: Callable[[NDArray[Any]], Any]) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert packing.batch([make(values)]).values == values.tobytes()
    assert packing.chunk(make(values)) == values.tobytes()


@pytest.mark.parametrize(
    "bad",
    [
        torch.ones(2, 3).to_sparse(),
        torch.ones(2, 3, device="meta"),
        OfArray(RuntimeError("only on\nthe device")),
        OfArray(ValueError("no")),
    ],
)
def test_an_array_that_its_library_does_not_give_away_is_named(packing: Packing, bad: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^sequences\[1\]: \w+ can't be read as an array: .+$") as caught:
        packing.batch([GOOD, bad])
    assert [field.field for field in caught.value.fields] == ["sequences[1]"]
    with pytest.raises(InvalidArgument, match=r"^chunk: "):
        packing.chunk(bad)


@given(values=hnp.arrays(st.sampled_from([np.int32, np.uint32, np.int64, np.uint64]), (3, 2)))
def test_integers_are_taken_if_they_are_exact(packing: Packing, values: NDArray[Any]) -> None:
    exact = all(int(np.float32(int(value))) == int(value) for value in values.flat)
    if exact:
        assert packing.batch([values]).values == values.astype("<f4").tobytes()
    else:
        with pytest.raises(InvalidArgument, match="which float32 can't hold"):
            packing.batch([values])


@pytest.mark.parametrize("value", [-(2**63), 2**62, -(2**24), 2**24 + 2, 2**40 - 2**16])
def test_a_large_integer_that_float32_holds_is_taken(packing: Packing, value: int) -> None:
    assert np.frombuffer(packing.batch([np.array([[value]])]).values, "<f4").tolist() == [value]


@pytest.mark.parametrize("bad", [7, None])
def test_what_is_not_a_list_of_sequences(packing: Packing, bad: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^sequences: a list of arrays expected, got "):
        packing.batch(bad)


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
        (np.ones((2, 3), "M8[s]"), "numbers expected, got dtype datetime64[s]"),
        (np.ones((2, 3), "m8[s]"), "numbers expected, got dtype timedelta64[s]"),
        (np.zeros((2, 3), [("a", "f4")]), "numbers expected, got dtype [('a', '<f4')]"),
        (b"abc", "numbers expected, got dtype |S3"),
        ([[2**70]], "numbers expected, got dtype object"),
        (array.array("d", [1, 2]), "an array [steps, features] expected, got shape [2]; one feature is [steps, 1]"),
        (np.array([[1, 2, 3], [4, 2**24 + 1, 6]]), INEXACT.format(1, 1, 2**24 + 1)),
        (np.array([[1, 2, -(2**24) - 1]], np.int32), INEXACT.format(0, 2, -(2**24) - 1)),
        (np.array([[1, 2, 2**53 + 1]]), INEXACT.format(0, 2, 2**53 + 1)),
        (np.array([[1, 2, 2**64 - 1]], np.uint64), INEXACT.format(0, 2, 2**64 - 1)),
        (torch.full((2, 3), 2**24 + 1), INEXACT.format(0, 0, 2**24 + 1)),
        (torch.ones((2, 3), dtype=torch.complex64), "numbers expected, got dtype complex64"),
        (np.ma.masked_equal(np.arange(6).reshape(2, 3), 5), "masked values, which are not numbers: fill or drop them"),
        ([np.ma.masked_equal([1, 2, 3], 2)], "masked values, which are not numbers: fill or drop them"),
        (pa.table({"a": [1, 2], "b": [3, None], "c": [5, 6]}), "[1][1] is not finite in float32"),
        (np.where(np.eye(2, 3, 1), np.nan, 1), "[0][1] is not finite in float32"),
        (np.where(np.eye(2, 3, 1), -np.inf, 1), "[0][1] is not finite in float32"),
        (np.where(np.eye(2, 3, 1), 1e39, 1), "[0][1] is not finite in float32"),
    ],
)
def test_a_bad_sequence_is_named(packing: Packing, bad: Any, what: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        packing.batch([GOOD, GOOD, bad, GOOD])
    assert str(caught.value) == f"sequences[2]: {what}"
    assert [(field.field, field.description) for field in caught.value.fields] == [("sequences[2]", what)]
    assert isinstance(caught.value, ValueError)


def test_finite_values_whose_sum_is_not_are_good(packing: Packing) -> None:
    large = np.full((4, 2), 3e38, np.float32)
    assert packing.batch([large, -large]).values == np.concatenate([large, -large]).tobytes()


@pytest.mark.parametrize("bad", [np.ones(3), np.ones((0, 3)), [[1, 2, np.nan]], [["a", "b", "c"]]])
def test_a_bad_chunk(packing: Packing, bad: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^chunk: "):
        packing.chunk(bad)


def test_a_chunk_is_row_major_float32(packing: Packing) -> None:
    chunk = np.arange(12).reshape(3, 4).T
    assert packing.chunk(chunk) == chunk.astype("<f4").tobytes()
