"""Three quarters of a minute of the soak, by its command."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_no_answer_is_wrong_no_step_lost_and_nothing_held_on_to() -> None:
    command = ["make", "soak", "MINUTES=0.75", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong answers" in done.stdout
