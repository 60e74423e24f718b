"""The examples for clusters, each on a local cluster: a worker is killed, no row is lost, no bit differs.

They need an environment of their own, which `make cluster-examples` makes, and Spark needs Java.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import bundles
from support.models import random_network
from support.processes import PATIENCE, run
from support.waiting import wait_until

from unroll_proto.sequences import Sequence, write_sequences

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-cluster" / "bin" / "python"
ROWS = int(os.environ.get("UNROLL_CLUSTER_ROWS", "200000"))
PARTS = 8
FEATURES = 3
# Ray joins a cluster if it finds the address of one. The examples import what .venv-cluster has.
FOREIGN = ("DASK_", "PYTHONPATH", "RAY_", "SPARK_")
SETTINGS = {
    # An optimizing compiler would take half of the time of so short a job.
    "JAVA_TOOL_OPTIONS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
    "RAY_USAGE_STATS_ENABLED": "0",
    "SPARK_LOCAL_IP": "127.0.0.1",
}

pytestmark = [
    pytest.mark.clusters,
    pytest.mark.skipif(
        not (ROOT / ".venv-cluster" / "done").exists(), reason="make cluster-examples makes .venv-cluster"
    ),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.export(random_network(), tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of parts."""
    folder = tmp_path_factory.mktemp("data")
    values = np.random.default_rng(0).standard_normal((ROWS + 29, FEATURES), dtype=np.float32)
    for part, rows in enumerate(np.array_split(np.arange(ROWS), PARTS)):
        sequences = (Sequence(str(row), values[row : row + 7 + row % 23]) for row in rows.tolist())
        write_sequences(folder / f"part-{part}.parquet", sequences)
    return folder


@pytest.fixture(scope="module")
def expected(source: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Answers of the command line."""
    out = tmp_path_factory.mktemp("expected") / "out.parquet"
    run("unroll", "classify", source, "--bundle", bundle, "-o", out)
    return by_id(pq.read_table(out))


def by_id(table: pa.Table) -> pa.Table:
    order = np.argsort(table["id"].cast(pa.int64()).to_numpy())
    return table.take(pa.array(order)).combine_chunks()


def descendants(pid: int) -> list[int]:
    found = [pid]
    for each in found:
        tasks = Path(f"/proc/{each}/task")
        try:
            found += [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found[1:]


def computes(pid: int) -> bool:
    """True if a process has loaded the bundle, which a worker does for its first batch."""
    try:
        return "onnxruntime_pybind" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(
    "command",
    [("ray_batch.py",), ("dask_batch.py",), ("spark_batch.py", "--master", "local-cluster[2,1,1024]")],
    ids=["ray", "dask", "spark"],
)
def test_no_row_is_lost_when_a_worker_is_killed(
    command: tuple[str, ...], bundle: Path, source: Path, expected: pa.Table, tmp_path: Path
) -> None:
    name, *options = command
    if name.startswith("spark") and not shutil.which("java"):
        pytest.skip("Spark needs Java")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
    log = tmp_path / "log"
    with log.open("wb") as file:
        driver = subprocess.Popen(
            [PYTHON, ROOT / "examples" / name, source, tmp_path / "out", "--bundle", bundle, *options],
            env={**environment, **SETTINGS, "SPARK_WORKER_DIR": str(tmp_path / "workers")},
            stdout=file,
            stderr=file,
            cwd=tmp_path,
            start_new_session=True,
        )
    workers: list[int] = []

    def begun_or_ended() -> bool:
        workers[:] = filter(computes, descendants(driver.pid))
        return bool(workers) or driver.poll() is not None

    try:
        wait_until(begun_or_ended, log.read_text)
        assert workers, log.read_text()
        os.kill(workers[-1], signal.SIGKILL)
        assert driver.wait(3 * PATIENCE) == 0, log.read_text()
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
    answers = by_id(pq.read_table(tmp_path / "out"))
    assert len(answers) == ROWS
    for column in ("id", "label", "probability"):
        assert answers[column].cast(expected[column].type).equals(expected[column])
    for column in ("probabilities", "logits"):
        mine, theirs = (np.asarray(table[column].combine_chunks().flatten()) for table in (answers, expected))
        assert mine.dtype == np.float32
        assert mine.tobytes() == theirs.tobytes()
