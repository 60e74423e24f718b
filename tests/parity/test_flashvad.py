"""flashvad in process, five states found by their names: no bit of any frame differs from a loop over its own file."""

import importlib.metadata
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from unroll_engine import Engine, Snapshot
from unroll_export.steps.importing import import_step
from unroll_export.steps.plan import Options
from unroll_export.steps.reading import read_source

FRAMES = 40


def published_file() -> Path:
    """Returns the path of `flashvad-stream.onnx`; skips the test if the wheel is not installed."""
    try:
        files = importlib.metadata.files("flashvad") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("flashvad is not installed: pip install --no-deps flashvad==0.1.0a1")
    return Path(str(next(file for file in files if file.name == "flashvad-stream.onnx").locate()))


def test_no_frame_differs_from_a_loop_over_the_file(tmp_path: Path) -> None:
    path = published_file()
    imported = import_step(read_source(path), Options(), tmp_path / "flashvad")
    assert imported.step.bitwise
    assert [state.tensor.name for state in imported.step.states] == ["recurrent", *(f"cache_{i}" for i in range(4))]
    features = np.random.default_rng(0).standard_normal((FRAMES, 43)).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {
        each.name: np.zeros([size if isinstance(size, int) else 1 for size in each.shape], np.float32)
        for each in session.get_inputs()
    }
    names, known = [each.name for each in session.get_outputs()], []
    for feature in features:
        feeds["feature"] = feature[np.newaxis, np.newaxis]
        found = dict(zip(names, session.run(None, feeds), strict=True))
        known.append(found.pop("speech_logits"))
        feeds |= {name.removeprefix("next_"): array for name, array in found.items()}
    with Engine.load(tmp_path / "flashvad") as engine:
        sequence = engine.open()
        first = sequence.advance(features[:7]).outputs["speech_logits"]
        resumed = engine.open(Snapshot.from_bytes(sequence.snapshot().to_bytes()))
        rest = resumed.advance(features[7:]).outputs["speech_logits"]
    assert first.tobytes() + rest.tobytes() == np.concatenate(known).tobytes()
