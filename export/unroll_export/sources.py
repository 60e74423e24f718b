"""Sources of training data: the JapaneseVowels recordings, the synthetic `recall` task, or a file."""

import hashlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from unroll_export.datasets import Dataset, Part, assemble
from unroll_proto.sequences import USUAL, Columns, Sequence, SequenceError, find_sources, read_blocks, read_sequences

JAPANESE_VOWELS = "japanese-vowels"
RECALL = "recall"
AEON = "aeon==1.6.0"

# Noise of this standard deviation hides the first step from a network that does not learn to keep it.
RECALL_CLASSES = 8
RECALL_NOISE = 0.8
# Training, validation and test sequences.
RECALL_SIZES = (2000, 200, 400)


class DataMissingError(ValueError):
    """A built-in data set is not installed; the message is one line with the way to get it."""


def japanese_vowels_files() -> tuple[Path, Path]:
    """Finds the training and the test file of JapaneseVowels in the installed `aeon` distribution.

    Raises:
        DataMissingError: aeon is not installed, or has no such files.
    """
    # find_spec of a top-level name runs no code of the package.
    spec = importlib.util.find_spec("aeon")
    how = f"pip install --no-deps {AEON}"
    if spec is None or not spec.submodule_search_locations:
        raise DataMissingError(f"{JAPANESE_VOWELS} comes with the aeon distribution, which is not installed: {how}")
    folder = Path(spec.submodule_search_locations[0], "datasets", "data", "JapaneseVowels")
    train, test = folder / "JapaneseVowels_TRAIN.ts", folder / "JapaneseVowels_TEST.ts"
    for file in (train, test):
        if not file.is_file():
            raise DataMissingError(f"{file} is missing from the aeon distribution; install the one that has it: {how}")
    return train, test


def japanese_vowels(*, validation: float, seed: int) -> Dataset:
    """Reads nine speakers saying /ae/ (Kudo, Toyama and Shimbo 1999): 270 training and 370 test sequences as published.

    Each is 7 to 29 timesteps of 12 LPC cepstrum coefficients. The files are those of the `aeon` distribution, which
    is found but never imported. `sha256` is that of the training file followed by the test file.

    Raises:
        DataMissingError: aeon is not installed, or has no such files.
    """
    train, test = japanese_vowels_files()
    files = {"train": train, "test": test}
    return assemble(
        train,
        [replace(row, split=split) for split, path in files.items() for row in read_sequences(path)],
        name=JAPANESE_VOWELS,
        sha256=_sha256_of(train, test),
        feature_prefix="lpc_cepstrum",
        validation=validation,
        test=0,
        seed=seed,
    )


def from_file(
    path: Path | str,
    test_path: Path | str | None = None,
    *,
    columns: Columns = USUAL,
    validation: float,
    test: float,
    seed: int,
) -> Dataset:
    """Reads the sequences of a file, folder, glob or URL, and those of `test_path`, if given, as the test split.

    `sha256` is that of the file, or of the file followed by the test file.

    Raises:
        SequenceError: a file can't be used.
    """
    rows, features = _read(path, columns)
    if test_path is not None:
        for row in rows:
            if row.split == "test":
                raise SequenceError(path, f"test, but {test_path} is the test split", row=row.row, column="split")
        extra = [replace(row, split="test") for row in _read(test_path, columns)[0]]
        _same_features(path, rows, test_path, extra)
        rows += extra
    return assemble(
        path,
        rows,
        name=Path(path).name,
        sha256=_sha256_of(*([path] if test_path is None else [path, test_path])),
        features=features,
        validation=validation,
        test=test,
        seed=seed,
    )


def recall(*, lag: int, seed: int) -> Dataset:
    """Generates sequences whose first step shows the class and whose other `lag` steps are noise (Hochreiter 1991).

    The first step is the unit vector of one of 8 classes; the others are normal with standard deviation 0.8. A network
    has to carry the class over `lag` steps, and the gradient has to come back over them. The same `lag` and `seed`
    give the same data; `sha256` is that of all values and labels.
    """
    random = np.random.default_rng(seed)
    digest = hashlib.sha256()
    parts = []
    for size in RECALL_SIZES:
        labels = random.permutation(np.arange(size) % RECALL_CLASSES)
        values = (RECALL_NOISE * random.standard_normal((size, lag + 1, RECALL_CLASSES))).astype(np.float32)
        values[:, 0] = np.eye(RECALL_CLASSES, dtype=np.float32)[labels]
        digest.update(values.tobytes() + labels.astype("<i8").tobytes())
        parts.append(Part(list(torch.from_numpy(values)), torch.from_numpy(labels)))
    names = tuple(str(i) for i in range(RECALL_CLASSES))
    features = tuple(f"class_{name}" for name in names)
    train, validation, test = parts
    return Dataset(RECALL, digest.hexdigest(), names, features, train, validation, test, {"lag": lag})


def _sha256_of(*paths: Path | str) -> str:
    """Returns the SHA-256 of concatenated files, in lower-case hex."""
    digest = hashlib.sha256()
    for source in find_sources(paths):
        with source.open() as file:
            while data := file.read(1 << 20):
                digest.update(data)
    return digest.hexdigest()


def _read(path: Path | str, columns: Columns) -> tuple[list[Sequence], tuple[str, ...]]:
    """Returns all sequences, and the names of the features; these are empty if the files name none."""
    rows: list[Sequence] = []
    features: tuple[str, ...] = ()
    for source in find_sources([path]):
        for block in read_blocks(source, 1024, 1 << 19, columns):
            rows += block.checked()
            features = features or block.features
    return rows, features


def _same_features(path: Path | str, rows: list[Sequence], test_path: Path | str, extra: list[Sequence]) -> None:
    if rows and extra and rows[0].values.shape[1] != extra[0].values.shape[1]:
        expected = rows[0].values.shape[1]
        what = f"{extra[0].values.shape[1]} features, {expected} expected as in {path}"
        raise SequenceError(test_path, what, row=extra[0].row, column="sequence")
