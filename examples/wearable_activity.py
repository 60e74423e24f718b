"""Classifies activities from a wearable's accelerometer and gyroscope during the motion.

The data set is BasicMotions, from aeon's wheel: 4 activities, 6 channels, 100 steps at 10 Hz.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

from unroll_engine import Engine
from unroll_proto.sequences import read_sequences


def data(part: str) -> Path:
    """A file of the installed wheel; `pip install --no-deps aeon` brings it."""
    files = importlib.metadata.files("aeon") or []
    return Path(str(next(file for file in files if file.name == f"BasicMotions_{part}.ts").locate()))


def main() -> None:
    """Trains a GRU, exports it with proof, and classifies one motion as it is streamed."""
    commands = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as name:
        run, models = Path(name) / "run", Path(name) / "models" / "motion"
        files = ["--data", str(data("TRAIN")), "--test-data", str(data("TEST"))]
        subprocess.run([commands / "unroll-train", *files, "--cell", "gru", "--epochs", "40", "--out", run], check=True)
        subprocess.run([commands / "unroll-export", run, "--out", models], check=True)
        motion = list(read_sequences(data("TEST")))[12]
        with Engine.load(models) as engine:
            sequence = engine.open()
            for step in range(0, 100, 20):
                logits = sequence.advance(motion.values[step : step + 20]).logits[-1]
                print(f"after {step + 20:3} steps: {engine.spec.class_labels[int(logits.argmax())]}")
        print(f"it is {motion.label}")


if __name__ == "__main__":
    main()
