"""Output of classes as Parquet. The only file of the client that imports pyarrow."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from unroll_client._types import Classification
from unroll_client.cli.locations import Location
from unroll_client.cli.outputs import COLUMNS, GROUP_ROWS, top_probabilities


class ParquetOutput:
    """Parquet with the columns COLUMNS, written by row groups."""

    def __init__(self, file: IO[bytes], header: bool = True) -> None:
        numbers = pa.list_(pa.float32())
        types = (pa.string(), pa.string(), pa.float32(), numbers, numbers)
        self._schema = pa.schema(list(zip(COLUMNS, types, strict=True)))
        # Of the columns only labels repeat.
        self._writer = pq.ParquetWriter(file, self._schema, use_dictionary=["label"])
        self._held: list[Any] = []
        self._rows = 0

    def write(self, ids: Sequence[str], result: Classification) -> None:
        """Buffers a batch until there are rows for a group."""
        columns = [
            pa.array(ids, pa.string()),
            pa.array(result.labels, pa.string()),
            pa.array(top_probabilities(result)),
            _lists(result.probabilities),
            _lists(result.logits),
        ]
        self._held.append(pa.record_batch(columns, schema=self._schema))
        self._rows += len(ids)
        if self._rows >= GROUP_ROWS:
            self._flush()

    def finish(self) -> None:
        """Writes the last group and the footer."""
        self._flush()
        with _arrow_errors():
            self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            with _arrow_errors():
                # Pages depend on the chunks of a column.
                table = pa.Table.from_batches(self._held, self._schema).combine_chunks()
                self._writer.write_table(table, row_group_size=self._rows)
        self._held, self._rows = [], 0

    @classmethod
    def join(cls, parts: Iterable[Location], file: IO[bytes]) -> None:
        """Writes files of this class as one, with the bytes that one writer would have written."""
        output = cls(file)
        for part in parts:
            with _arrow_errors():
                output._held = pq.read_table(pa.BufferReader(part.read_bytes()), schema=output._schema).to_batches()
                output._rows = sum(batch.num_rows for batch in output._held)
                output._flush()
        output.finish()


@contextmanager
def _arrow_errors() -> Iterator[None]:
    """Converts pyarrow's exceptions to OSError."""
    try:
        yield
    except pa.ArrowException as error:
        raise OSError(" ".join(str(error).split())) from None


def _lists(values: NDArray[np.float32]) -> Any:
    rows, width = values.shape
    offsets = np.arange(0, (rows + 1) * width, width, dtype=np.int32) if width else np.zeros(rows + 1, np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)))
