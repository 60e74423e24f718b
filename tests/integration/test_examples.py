"""The scripts in examples/ run to their end, as a reader runs them."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.silero import published_file

EXAMPLES = Path(__file__).parents[2] / "examples"


def output_of(name: str, *arguments: str) -> str:
    """Runs an example and returns what it prints."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_live_vad_loses_no_bit_when_its_server_is_killed() -> None:
    published_file()
    output = output_of("live_vad.py", "--streams", "12", "--seconds", "1", "--measure", "0")
    assert "is killed; every stream continues from its snapshot" in output
    assert "frames whose bits differ from silero's own loop: 0" in output


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("keras_tagger.py", "the same bits alone and in any batch"),
        ("gru_forecaster.py", "mean error: 0.0"),
        ("wearable_activity.py", "after 100 steps: "),
    ],
)
def test_an_example_runs(name: str, part: str) -> None:
    assert part in output_of(name)
