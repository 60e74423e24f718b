"""Parquet files classified on a Dask cluster, a partition at a time.

    python examples/dask_batch.py IN.parquet OUT --bundle models/jv

Without --scheduler it starts a cluster of processes on this machine. Dask starts a worker again if it dies, and
computes what it held once more. Needs: pip install 'dask[dataframe]' distributed ./proto ./engine
"""

import argparse

import dask
import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
from distributed import Client, LocalCluster

from unroll_engine import Predictor

NUMBERS = pa.list_(pa.float32())
KINDS = {
    "id": pa.string(),
    "label": pa.string(),
    "probability": pa.float32(),
    "probabilities": NUMBERS,
    "logits": NUMBERS,
}
SCHEMA = pa.schema(list(KINDS.items()))
META = pd.DataFrame({name: pd.Series(dtype=pd.ArrowDtype(kind)) for name, kind in KINDS.items()})


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", help="a Parquet file, or a folder of them, with the columns `id` and `sequence`")
    parser.add_argument("target", help="folder to write to")
    parser.add_argument("--bundle", required=True, help="a path that every node has, such as a shared file system")
    parser.add_argument("--workers", type=int, default=2, help="processes of a cluster of this machine")
    parser.add_argument("--scheduler", help="address of the cluster's scheduler, as tcp://HOST:8786")
    arguments = parser.parse_args()

    # Sequences stay Arrow's, out of whose buffers the engine reads them; else each would become thousands of objects.
    dask.config.set({"dataframe.convert-string": False})
    with Client(arguments.scheduler or LocalCluster(n_workers=arguments.workers, threads_per_worker=1)):
        rows = dd.read_parquet(
            arguments.source,
            columns=["id", "sequence"],
            split_row_groups="adaptive",
            blocksize="16MiB",
            arrow_to_pandas={"types_mapper": pd.ArrowDtype},
        )
        classes = rows.map_partitions(Predictor(arguments.bundle), meta=META)
        classes.to_parquet(arguments.target, write_index=False, schema=SCHEMA)


if __name__ == "__main__":
    main()
