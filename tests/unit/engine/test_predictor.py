"""The predictor: any kind of batch, the same columns and bits; one load in a process, also after pickling."""

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from support import bundles
from support.models import random_network
from support.values import random_values

from unroll_engine import BundleError, Engine, InvalidRequestError, Predictor

SEQUENCES = [random_values(steps, seed) for seed, steps in enumerate((3, 9, 1, 30))]
NESTED = [sequence.tolist() for sequence in SEQUENCES]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.export(random_network(), tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def expected(bundle: Path) -> bytes:
    return Engine.load(bundle).classify(SEQUENCES).logits.tobytes()


def objects(values: list[Any]) -> Any:
    """Arrays of arrays of arrays of numbers, as pandas reads nested lists."""
    outer = np.empty(len(values), object)
    for index, value in enumerate(values):
        outer[index] = objects(value) if isinstance(value[0], list) else np.array(value, np.float32)
    return outer


@pytest.mark.parametrize(
    "batch",
    [
        SEQUENCES,
        NESTED,
        objects(NESTED),
        [torch.from_numpy(sequence).requires_grad_() for sequence in SEQUENCES],
        {"sequence": objects(NESTED), "id": np.arange(4)},
        pa.array(NESTED, pa.list_(pa.list_(pa.float32()))),
        pa.chunked_array([NESTED[:1], NESTED[1:]], pa.large_list(pa.list_(pa.float32(), SEQUENCES[0].shape[1]))),
        pa.table({"id": range(4), "sequence": pa.array(NESTED, pa.list_(pa.list_(pa.float64())))}),
        pa.record_batch({"x": pa.array([NESTED[0], *NESTED])}).slice(1),
    ],
    ids=["arrays", "lists", "objects", "tensors", "columns", "array", "chunks", "table", "batch"],
)
def test_any_batch_has_the_same_bits(bundle: Path, expected: bytes, batch: Any) -> None:
    result = Predictor(bundle)(batch)
    names = ["label", "probability", "probabilities", "logits"]
    if isinstance(result, pa.Table):
        assert result.column_names == [name for name in ("id",) if "id" in getattr(batch, "column_names", ())] + names
        logits = np.array(result["logits"].to_pylist(), np.float32)

    else:
        assert [name for name in result if name != "id"] == names
        logits = result["logits"]
    assert logits.tobytes() == expected


def test_arrays_and_tensors_of_a_batch(bundle: Path) -> None:
    x = np.stack([SEQUENCES[3][:20], SEQUENCES[3][10:]])
    predict = Predictor(bundle)
    mine = predict(x)
    assert mine["logits"].shape == (2, len(mine["probabilities"][0]))
    assert mine["label"].tolist() == Engine.load(bundle).classify(x).labels
    assert predict(torch.from_numpy(x))["logits"].tobytes() == mine["logits"].tobytes()
    assert predict([])["probabilities"].shape[0] == 0


def test_one_load_in_a_process_also_after_pickling(bundle: Path, expected: bytes) -> None:
    first = Predictor(bundle)
    second = pickle.loads(pickle.dumps(first))  # noqa: S301 (our own)
    assert len(pickle.dumps(first)) < 1000
    with ThreadPoolExecutor(4) as pool:
        engines = list(pool.map(lambda each: each.engine, [first, second, Predictor(bundle), first]))
    assert len(set(map(id, engines))) == 1
    assert second(SEQUENCES)["logits"].tobytes() == expected


def test_nothing_is_imported_that_was_not_given(bundle: Path) -> None:
    code = f"""
import sys, numpy as np
from unroll_engine import Predictor
features = Predictor({str(bundle)!r}).engine.spec.input_size
Predictor({str(bundle)!r})([np.ones((3, features), np.float32)])
print({{"torch", "pandas", "pyarrow"}} & set(sys.modules))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"a": [1], "b": [2]}, r"sequence: missing; the columns are \['a', 'b'\]"),
        (pa.array([[[1.0, 2.0], [1.0]]]), "sequences: timesteps of different numbers of features"),
        (pa.array([[[1.0, None, 1.0]]]), "lists of lists of numbers expected, got null"),
        (pa.array([[[1.0] * 3], None]), "got null at 1"),
        (pa.array(["a"]), "got string"),
        ([np.ones((2, 99))], r"sequences\[0\]: shape \[2, 99\]"),
    ],
)
def test_a_batch_that_cannot_be_used(bundle: Path, batch: Any, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        Predictor(bundle)(batch)


def test_a_path_without_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        Predictor(tmp_path)([[[1.0]]])
