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
from support.processes import run

from unroll_proto.sequences import Sequence, write_sequences

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-cluster" / "bin" / "python"
ROWS = int(os.environ.get("UNROLL_CLUSTER_ROWS", "200000"))
FEATURES = 3

pytestmark = [
    pytest.mark.clusters,
    pytest.mark.skipif(not PYTHON.exists(), reason="make cluster-examples makes .venv-cluster"),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.export(random_network(), tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "in.parquet"
    values = np.random.default_rng(0).standard_normal((ROWS + 29, FEATURES), dtype=np.float32)
    write_sequences(path, (Sequence(str(row), values[row : row + 7 + row % 23]) for row in range(ROWS)))
    return path


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


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def computes(pid: int) -> bool:
    """True if a process has loaded the bundle: it has a library of the engine in memory."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False
    return "_kernel.cpython" in maps or "onnxruntime_pybind" in maps


@pytest.mark.parametrize("name", ["ray_batch.py", "dask_batch.py", "spark_batch.py"])
def test_no_row_is_lost_when_a_worker_is_killed(
    name: str, bundle: Path, source: Path, expected: pa.Table, tmp_path: Path
) -> None:
    if name.startswith("spark") and not shutil.which("java"):
        pytest.skip("Spark needs Java")
    path = os.pathsep.join(str(ROOT / folder) for folder in ("proto", "engine"))
    # Ray joins a cluster if it finds the address of one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SPARK_", "DASK_"))}
    driver = subprocess.Popen(
        [PYTHON, ROOT / "examples" / name, source, tmp_path / "out", "--bundle", bundle, "--workers", "2"],
        env={**environment, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    )
    assert driver.stderr is not None
    log = driver.stderr
    killed = 0
    try:
        while driver.poll() is None and not killed:
            # A child that has not begun its own program yet has the driver's memory and command.
            own = command_of(driver.pid)
            workers = [pid for pid in descendants(driver.pid) if computes(pid) and command_of(pid) not in (own, b"")]
            if workers:
                killed = workers[-1]
                os.kill(killed, signal.SIGKILL)
        said = log.read()
        assert driver.wait(300) == 0, said[-3000:]
    finally:
        log.close()
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
    assert killed
    answers = by_id(pq.read_table(tmp_path / "out"))
    assert len(answers) == ROWS
    for column in ("id", "label", "probability"):
        assert answers[column].cast(expected[column].type).equals(expected[column])
    for column in ("probabilities", "logits"):
        mine, theirs = (np.asarray(table[column].combine_chunks().flatten()) for table in (answers, expected))
        assert mine.dtype == np.float32
        assert mine.tobytes() == theirs.tobytes()
