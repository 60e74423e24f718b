"""The soak, three minutes of it, by the command that a person would run."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("front", "minutes"), [("grpcio", 1.5), ("envoy", 1.5)])
def test_no_answer_is_wrong_no_step_lost_and_nothing_held_on_to(front: str, minutes: float) -> None:
    command = ["make", "soak", f"MINUTES={minutes}", f"FRONT={front}", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong answers" in done.stdout
