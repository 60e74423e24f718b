"""Parquet files classified on Spark, by a pandas UDF over Arrow batches.

    python examples/spark_batch.py IN.parquet OUT --bundle models/jv

Without --master it runs on this machine. Spark starts a Python worker again if it dies, and repeats its task. Needs
Java 17 and: pip install pyspark pandas ./proto ./engine
"""

import argparse
import os
import sys
from collections.abc import Iterator

import pyarrow as pa
from pyspark.sql import SparkSession

from unroll_engine import Predictor

SCHEMA = "id string, label string, probability float, probabilities array<float>, logits array<float>"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", help="a Parquet file, or a folder of them, with the columns `id` and `sequence`")
    parser.add_argument("target", help="folder to write to")
    parser.add_argument("--bundle", required=True, help="a path that every node has, such as a shared file system")
    parser.add_argument("--workers", type=int, default=2, help="tasks at once on this machine")
    parser.add_argument("--master", help="the cluster, as spark://HOST:7077")
    arguments = parser.parse_args()

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    # On this machine, four failures of a task are allowed, as a cluster allows them.
    session = (
        SparkSession.builder.master(arguments.master or f"local[{arguments.workers},4]")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", 8192)
        .config("spark.sql.files.maxPartitionBytes", "16m")
        .config("spark.executorEnv.OMP_NUM_THREADS", 1)
        .getOrCreate()
    )
    predictor = Predictor(arguments.bundle, threads=1)

    def classify(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield from predictor(batch).to_batches()

    rows = session.read.parquet(arguments.source).select("id", "sequence")
    rows.mapInArrow(classify, SCHEMA).write.parquet(arguments.target)
    session.stop()


if __name__ == "__main__":
    main()
