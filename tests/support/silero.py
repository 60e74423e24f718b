"""silero-vad's published graph, from its wheel, and its own loop over the chunks of one stream."""

import importlib.metadata
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from unroll_engine.models.spec import Float32Array
from unroll_export.steps.plan import Options

OPTIONS = Options(constants={"sr": "16000"}, contexts={"input": 64}, chunk=512)
"""Options of the import."""
CHUNK = 512


def published_file() -> Path:
    """Returns the path of `silero_vad.onnx`; skips the test if the wheel is not installed."""
    try:
        files = importlib.metadata.files("silero-vad") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("silero-vad is not installed: pip install --no-deps silero-vad==6.2.3")
    found = next(file for file in files if file.name == "silero_vad.onnx")
    return Path(str(found.locate()))


def own_loop(path: Path, chunks: Float32Array) -> Float32Array:
    """Returns the speech probabilities of the chunks [steps, 512] of one stream, float32 [steps].

    Does the same as silero_vad.utils_vad.OnnxWrapper, in numpy, with state and context of the stream.
    """
    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    state, context = np.zeros((2, 1, 128), np.float32), np.zeros((1, 64), np.float32)
    found = []
    for chunk in chunks:
        values = np.concatenate([context, chunk[np.newaxis]], axis=1)
        feeds = {"input": values, "state": state, "sr": np.array(16000, np.int64)}
        probability, state = session.run(None, feeds)
        context = values[:, -64:]
        found.append(probability[0, 0])
    return np.array(found, np.float32)


def speech_like(streams: int, steps: int, seed: int = 0) -> Float32Array:
    """Makes ambiguous 16 kHz audio, voiced sounds with pauses, [streams, steps, 512]."""
    rng = np.random.default_rng(seed)
    time = np.arange(steps * CHUNK) / 16000
    pitch = rng.uniform(80, 260, (streams, 1)) * (1 + 0.05 * np.sin(2 * np.pi * rng.uniform(2, 5, (streams, 1)) * time))
    phase = 2 * np.pi * np.cumsum(pitch, axis=1) / 16000
    voice = np.sum([np.sin(k * phase) / k for k in range(1, 12)], axis=0)
    loudness = np.clip(np.sin(2 * np.pi * rng.uniform(0.5, 3, (streams, 1)) * time), 0, 1)
    noise = rng.standard_normal(voice.shape) * 0.01
    audio: Float32Array = (0.1 * voice * loudness + noise).astype(np.float32)
    return audio.reshape(streams, steps, CHUNK)
