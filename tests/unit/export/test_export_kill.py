"""SIGKILL at any moment of an export leaves no partial bundle, and the next export removes the leftovers."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.exports import run_of, write_run
from support.models import random_network
from support.processes import BIN, PATIENCE

from unroll_export.bundle_writer import PREFIX, Draft
from unroll_proto import bundle


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(run_of(random_network(1, 1, 1), longest_sequence=1), tmp_path_factory.mktemp("runs") / "made-up")


def wait_for(pattern: str, out: Path, process: subprocess.Popen[bytes]) -> None:
    """Waits for a file of the pattern, or for the version, since the last files exist only briefly."""
    deadline = time.monotonic() + PATIENCE
    while not (any(out.glob(pattern)) or (out / "1").exists()):
        assert process.poll() is None, "the export ended before it could be killed"
        assert time.monotonic() < deadline
        os.sched_yield()


@pytest.mark.parametrize("moment", ["", bundle.TORCHSCRIPT, bundle.PARITY, bundle.MANIFEST])
def test_leaves_no_half_bundle(run_path: Path, tmp_path: Path, moment: str) -> None:
    out = tmp_path / "models" / "jv"
    process = subprocess.Popen([BIN / "unroll-export", run_path, "--out", out])
    try:
        wait_for(f"{PREFIX}*/{moment}", out, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()

    left = {path.name for path in out.iterdir()}
    assert all(name == "1" or name.startswith(PREFIX) for name in left)
    if "1" in left:
        bundle.verify_bundle(out / "1")
    else:
        assert len(left) == 1
    with Draft(out) as following:
        assert {path.name for path in out.iterdir()} == (left & {"1"}) | {following.path.name}
