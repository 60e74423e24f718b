"""silero-vad in process: no bit of any frame differs from its own loop."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.silero import OPTIONS, own_loop, published_file, speech_like

from unroll_engine import Engine, Snapshot
from unroll_export.steps.importing import import_step
from unroll_export.steps.reading import read_source

STREAMS, STEPS = 24, 60


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The imported model."""
    root = tmp_path_factory.mktemp("silero")
    imported = import_step(read_source(published_file()), OPTIONS, root / "vad")
    assert imported.step.bitwise
    return Engine.load(root / "vad", max_lanes=16)


def test_no_frame_differs_from_silero_s_own_loop(engine: Engine) -> None:
    audio = speech_like(STREAMS, STEPS)
    path = published_file()

    def frames(index: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """Returns the frames of a stream that is cut, and resumed from its snapshot."""
        sequence, parts = engine.open(), []
        for part in np.split(audio[index], sorted({1, 7 + index, STEPS - 3})):
            parts.append(sequence.advance(part).outputs["output"][:, 0])
            sequence = engine.open(Snapshot.from_bytes(sequence.snapshot().to_bytes()))
        return np.concatenate(parts)

    with ThreadPoolExecutor(4) as pool:
        served = list(pool.map(frames, range(STREAMS)))
    expected = [own_loop(path, chunks) for chunks in audio]
    assert [found.tobytes() for found in served] == [known.tobytes() for known in expected]
    # The values must vary, or the bits would prove nothing.
    assert np.ptp(np.concatenate(expected)) > 0.5


def test_the_form_of_products_is_near_and_keeps_its_own_bits(engine: Engine, tmp_path: Path) -> None:
    imported = import_step(read_source(published_file()), replace(OPTIONS, matmul=True), tmp_path / "vad")
    assert (imported.step.form, imported.step.bitwise) == ("matmul", True)
    audio = speech_like(1, 200, seed=5)[0]
    with Engine.load(tmp_path / "vad") as products:
        found = products.open().advance(audio).outputs["output"]
        expected = engine.open().advance(audio).outputs["output"]
        np.testing.assert_allclose(found, expected, atol=1e-4)
        sequence = products.open()
        parts = [sequence.advance(part).outputs["output"] for part in np.split(audio, [1, 90])]
        assert np.concatenate(parts).tobytes() == found.tobytes()


def test_a_stream_is_a_kibibyte_and_a_quarter(engine: Engine, tmp_path: Path) -> None:
    sequence = engine.open()
    sequence.advance(speech_like(1, 3)[0])
    snapshot = sequence.snapshot()
    assert sum(map(len, snapshot.data)) == 4 * (2 * 128 + 64)
    snapshot.save(tmp_path / "state.bin")
    assert Snapshot.load(tmp_path / "state.bin") == snapshot


def test_silero_s_own_wrapper_gives_the_same(engine: Engine) -> None:
    utils = pytest.importorskip("silero_vad.utils_vad", reason="silero-vad or what it needs is not installed")
    torch = pytest.importorskip("torch")
    chunks = speech_like(1, 40, seed=3)[0]
    wrapper = utils.OnnxWrapper(str(published_file()), True)
    known = [wrapper(torch.from_numpy(chunk), 16000).numpy().tobytes() for chunk in chunks]
    assert known == [frame.tobytes() for frame in engine.open().advance(chunks).outputs["output"]]
