"""The loop that most people write: a DataLoader, padding, nn.RNN, Parquet out. It runs in a process of its own.

`python -m unroll_bench.offline.loop IN OUT BATCH WORKERS THREADS ROWS`
"""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from unroll_bench.contest.contestants import CLASSES
from unroll_bench.contest.network import network

Batch = tuple[list[str], Tensor, Tensor]
READ_ROWS = 4096
GROUP_ROWS = 1 << 16


class Rows(IterableDataset[tuple[str, Tensor]]):
    """Sequences of a Parquet file, read by batches of rows; each worker of a DataLoader takes every n-th batch.

    Args:
        path: The file.
        rows: Most sequences to read.
    """

    def __init__(self, path: Path, rows: int) -> None:
        self._path = path
        self._rows = rows

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        with pq.ParquetFile(self._path) as file:
            parts = islice(file.iter_batches(READ_ROWS, columns=["id", "sequence"]), -(-self._rows // READ_ROWS))
            for part in islice(parts, first, None, step):
                steps = part["sequence"].flatten()
                values = torch.from_numpy(steps.flatten().to_numpy(zero_copy_only=False).copy()).view(len(steps), -1)
                lengths = part["sequence"].value_lengths().to_pylist()
                yield from zip(part["id"].to_pylist(), torch.split(values, lengths), strict=True)


def padded(rows: list[tuple[str, Tensor]]) -> Batch:
    """Pads sequences to the longest of their batch."""
    ids, sequences = zip(*rows, strict=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return list(ids), pad_sequence(list(sequences), batch_first=True), lengths


def main(source: Path, target: Path, size: int, workers: int, threads: int, rows: int) -> None:
    """Classifies a file."""
    torch.set_num_threads(threads)
    loader = DataLoader(Rows(source, rows), batch_size=size, collate_fn=padded, num_workers=workers)
    labels = [f"class {index}" for index in range(CLASSES)]
    numbers = pa.list_(pa.float32())
    kinds = {"id": pa.string(), "label": pa.string(), "probabilities": numbers, "logits": numbers}
    held: list[pa.RecordBatch] = []
    with torch.inference_mode(), pq.ParquetWriter(target, pa.schema(list(kinds.items()))) as writer:
        for ids, x, lengths in loader:
            states = network().rnn((x - network().mean) / network().std)[0]
            logits = network().fc(states[torch.arange(len(x)), lengths - 1])
            probabilities = logits.softmax(1)
            offsets = pa.array(range(0, len(ids) * CLASSES + 1, CLASSES), pa.int32())
            columns = [
                pa.array(ids),
                pa.array([labels[index] for index in logits.argmax(1).tolist()]),
                pa.ListArray.from_arrays(offsets, pa.array(probabilities.numpy().ravel())),
                pa.ListArray.from_arrays(offsets, pa.array(logits.numpy().ravel())),
            ]
            held.append(pa.record_batch(columns, list(kinds)))
            if sum(map(len, held)) >= GROUP_ROWS:
                writer.write_table(pa.Table.from_batches(held))
                held = []
        if held:
            writer.write_table(pa.Table.from_batches(held))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:7]))
