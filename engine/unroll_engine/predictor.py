"""Predictor: a bundle as a function from batches to columns, for Ray, Spark, Dask and notebooks."""

import os
import threading
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unroll_engine.arrays import Ragged
from unroll_engine.core import usable_cores
from unroll_engine.engine import Engine
from unroll_engine.errors import InvalidRequestError

Columns = dict[str, NDArray[Any]]

_loading = threading.Lock()


class Predictor:
    """Classifies batches by a bundle: `Predictor("models/jv")(batch)`. It can be called from any thread.

    It loads the bundle at the first call, once in a process, however many predictors of the same settings there are.
    Pickled, it carries the path and the settings only, so that each worker of a cluster loads the bundle itself.

    Args:
        path: A bundle, a folder of a model's versions, or a repository of one model; see Engine.load. Other machines
            must find the same path.
        column: Column of the sequences, if a batch is a table of several columns.
        runtime: See Engine.load.
        device: See Engine.load.
        threads: Threads of the step kernel; None for OMP_NUM_THREADS, which clusters set to a worker's share of the
            cores, or else one per usable core.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        column: str = "sequence",
        runtime: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        self._settings = (os.path.abspath(path), runtime, device, threads)  # noqa: PTH100 (links stay as they are)
        self._column = column

    @property
    def engine(self) -> Engine:
        """The engine of this process.

        Raises:
            BundleError, RuntimeUnavailableError: it can't be loaded; see Engine.load.
        """
        with _loading:
            return _engine(os.getpid(), *self._settings)

    def __call__(self, batch: Any) -> Any:
        """Computes the outputs of each sequence's last timestep, with the bits that a server would answer.

        Args:
            batch: An array or torch tensor [batch, steps, features]; a list of arrays or tensors [steps, features];
                a pandas Series or an Arrow array of sequences as nested lists; or a table that has them in a column:
                a mapping of columns, a DataFrame, an Arrow Table or RecordBatch.

        Returns:
            For a table, one of the same kind with its other columns; for a Series a DataFrame, for an Arrow array a
            Table; else a dict of arrays [batch, ...]. The columns are `label`, `probability` (of that label),
            `probabilities` and `logits`; of a model without classes, its outputs by name. They replace columns of the
            same name.

        Raises:
            InvalidRequestError: a sequence can't be used; a ValueError, which names it.
        """
        kind = type(batch).__module__.partition(".")[0]
        if kind == "pandas":
            return self._of_pandas(batch)
        if kind == "pyarrow":
            return self._of_arrow(batch)
        if isinstance(batch, Mapping):
            rest = {name: values for name, values in batch.items() if name != self._name(batch)}
            return {**rest, **self._columns(_arrays(batch[self._name(batch)]))}
        return self._columns(batch if isinstance(batch, Ragged) else _arrays(batch))

    def _columns(self, sequences: Iterable[Any] | Ragged) -> Columns:
        engine = self.engine
        if not engine.spec.class_labels:
            return dict(engine.last_outputs(sequences))
        result = engine.classify(sequences)
        return {
            "label": np.array(engine.spec.class_labels)[result.label_indices],
            "probability": np.take_along_axis(result.probabilities, result.label_indices[:, np.newaxis], axis=1)[:, 0],
            "probabilities": result.probabilities,
            "logits": result.logits,
        }

    def _name(self, names: Iterable[str]) -> str:
        """Returns the name of the column of sequences: as given, or that of the only column."""
        names = list(names)
        if self._column not in names and len(names) != 1:
            raise InvalidRequestError(f"missing; the columns are {names!r:.200}", self._column)
        return self._column if self._column in names else names[0]

    def _of_pandas(self, batch: Any) -> Any:
        import pandas as pd

        rest = pd.DataFrame(index=batch.index)
        if batch.ndim == 2:
            name = self._name(batch.columns)
            rest, batch = batch.drop(columns=[name]), batch[name]
        by_arrow = hasattr(batch.dtype, "pyarrow_dtype")
        columns = self._columns(_ragged(batch.array.__arrow_array__()) if by_arrow else _arrays(batch))
        return rest.assign(**{name: list(values) if values.ndim > 1 else values for name, values in columns.items()})

    def _of_arrow(self, batch: Any) -> Any:
        import pyarrow as pa

        rest: dict[str, Any] = {}
        if hasattr(batch, "schema"):
            name = self._name(batch.schema.names)
            rest = {other: batch.column(other) for other in batch.schema.names if other != name}
            batch = batch.column(name)
        columns = self._columns(_ragged(batch))
        return pa.table({**rest, **{name: _lists(values) for name, values in columns.items()}})


@cache
def _engine(process: int, path: str, runtime: str, device: str, threads: int | None) -> Engine:
    """Loads a bundle. A forked process, whose number is another, loads its own."""
    share = os.environ.get("OMP_NUM_THREADS", "")
    cores = usable_cores()
    threads = threads or min(int(share), cores) if share.isdigit() and int(share) else threads or cores
    return Engine.load(path, runtime=runtime, device=device, threads=threads)


def _arrays(batch: Any) -> Iterable[Any]:
    """Returns sequences as arrays; nested arrays of objects, as pandas reads them from Parquet, become numbers."""
    if type(batch).__module__.partition(".")[0] == "torch":
        return _array(batch)  # type: ignore[no-any-return]
    if isinstance(batch, np.ndarray) and batch.dtype != object:
        return batch
    return [_array(each) for each in batch]


def _array(sequence: Any) -> Any:
    if type(sequence).__module__.partition(".")[0] == "torch":
        sequence = sequence.detach().cpu()
        # NumPy has neither bfloat16 nor the 8-bit floats.
        return (sequence.float() if sequence.is_floating_point() else sequence).numpy()
    if isinstance(sequence, np.ndarray) and sequence.dtype == object:
        return sequence.tolist() if not len(sequence) or np.ndim(sequence[0]) != 1 else list(sequence)
    return sequence


def _ragged(column: Any) -> Ragged:
    """Reads an Arrow array of lists of lists of numbers out of its buffers, without an object for each sequence."""
    import pyarrow as pa

    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    while isinstance(array, pa.ExtensionArray):  # such as tensors
        array = array.storage
    steps, lengths = _unnest(array)
    numbers, widths = _unnest(steps)
    if len(set(widths.tolist())) > 1:
        raise InvalidRequestError("timesteps of different numbers of features", "sequences")
    if numbers.null_count or not (pa.types.is_floating(numbers.type) or pa.types.is_integer(numbers.type)):
        problem = "null" if numbers.null_count else f"{numbers.type}"
        raise InvalidRequestError(f"lists of lists of numbers expected, got {problem}", "sequences")
    values = numbers.to_numpy(zero_copy_only=False).reshape(len(widths), -1 if len(widths) else 0)
    with np.errstate(over="ignore"):
        return Ragged(values.astype(np.float32, copy=False), lengths)


def _unnest(lists: Any) -> tuple[Any, NDArray[np.int64]]:
    """Removes one level of lists: returns the concatenated items and the length of each list."""
    import pyarrow as pa

    if lists.null_count:
        where = int(np.flatnonzero(lists.is_null().to_numpy(zero_copy_only=False))[0])
        raise InvalidRequestError(f"lists of lists of numbers expected, got null at {where}", "sequences")
    if pa.types.is_fixed_size_list(lists.type):
        return lists.flatten(), np.full(len(lists), lists.type.list_size, np.int64)
    if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
        raise InvalidRequestError(f"lists of lists of numbers expected, got {lists.type}", "sequences")
    offsets = lists.offsets.to_numpy()
    return lists.values.slice(offsets[0], offsets[-1] - offsets[0]), np.diff(offsets).astype(np.int64)


def _lists(values: NDArray[Any]) -> Any:
    """Returns a column as an Arrow array: of lists if it has several axes."""
    import pyarrow as pa

    if values.ndim == 1:
        return pa.array(values)
    rows, width = len(values), int(np.prod(values.shape[1:]))
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * width), pa.array(values.reshape(-1)))
