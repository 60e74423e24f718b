"""Parquet files classified on a Ray cluster, by a pool of actors that grows and shrinks with the work.

    python examples/ray_batch.py IN.parquet OUT --bundle models/jv

`ray.init()` starts a cluster of this machine, or joins the one that RAY_ADDRESS names. Ray starts an actor again if it
dies, and repeats its batch. Needs: pip install 'ray[data]' ./proto ./engine
"""

import argparse

import ray
from ray.data import ActorPoolStrategy

from unroll_engine import Predictor


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", help="a Parquet file, or a folder of them, with the columns `id` and `sequence`")
    parser.add_argument("target", help="folder to write to")
    parser.add_argument("--bundle", required=True, help="a path that every node has, such as a shared file system")
    parser.add_argument("--workers", type=int, default=2, help="most actors, of one core each")
    arguments = parser.parse_args()

    # Where results are small, their order is cheap to keep.
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    rows = ray.data.read_parquet(arguments.source, columns=["id", "sequence"])
    classes = rows.map_batches(
        Predictor,
        fn_constructor_args=[arguments.bundle],
        batch_format="pyarrow",  # Arrow's buffers go into the engine as they are
        batch_size=8192,
        num_cpus=1,
        compute=ActorPoolStrategy(min_size=1, max_size=arguments.workers),
    )
    classes.write_parquet(arguments.target)


if __name__ == "__main__":
    main()
