"""The folder of a training run: its file names, and how its files are written and read."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from unroll_export.model import CELLS, Nonlinearity, RecurrentClassifier, build

FORMAT = 1
SUMMARY = "summary.json"
WEIGHTS = "weights.safetensors"
CHECKPOINT = "checkpoint.pt"
EVENTS = "events.out.tfevents.*"
REPORT = "report.png"


class RunError(ValueError):
    """A run folder can't be used; the message is one line with the file and the problem."""


@dataclass(frozen=True)
class TrainedRun:
    """A finished training run.

    Attributes:
        model: The trained network in eval mode, standardization included.
        class_labels: Class names by index: one per logit, or two for a binary model (index 1 is the positive one).
        feature_names: One per input feature.
        summary: `summary.json`; see `unroll_export.experiment.summarize`.
    """

    model: RecurrentClassifier[Any]
    class_labels: tuple[str, ...]
    feature_names: tuple[str, ...]
    summary: dict[str, Any]


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yields a temporary neighbour to write to, which replaces `path` once the block has succeeded."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_weights(model: RecurrentClassifier[Any], path: Path) -> None:
    """Writes the state dict (`rnn.*`, `fc.*`, `mean`, `std`) as safetensors."""
    with replaced(path) as partial:
        # save_file makes files that only their owner can read, while servers often run as another user.
        partial.write_bytes(save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}))


def load_summary(path: Path) -> dict[str, Any]:
    """Reads `summary.json` of the run folder `path`.

    Raises:
        RunError: the folder holds no finished run, or the file can't be read.
    """
    file = path / SUMMARY
    if not file.is_file():
        if (path / CHECKPOINT).is_file():
            raise RunError(f"{path}: training has not finished (unroll-train --resume continues it)")
        raise RunError(f"{path}: no training run here ({SUMMARY} is missing)")
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(summary, dict) or summary.get("format") != FORMAT:
        raise RunError(f"{file}: not a summary of format {FORMAT}")
    return summary


def load_run(path: Path) -> TrainedRun:
    """Reads the trained model of the run folder `path`.

    Raises:
        RunError: the folder holds no finished run, or its files do not match.
    """
    summary = load_summary(path)
    try:
        class_labels = tuple(str(label) for label in summary["class_labels"])
        feature_names = tuple(str(name) for name in summary["feature_names"])
        sizes = {name: int(summary[name]) for name in ("input_size", "hidden_size", "output_size", "num_layers")}
        architecture = str(summary["architecture"])
        nonlinearity: Nonlinearity = "relu" if summary.get("nonlinearity") == "relu" else "tanh"
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path / SUMMARY}: missing or of the wrong type: {error}") from error
    for size, value in sizes.items():
        if value < 1:
            raise RunError(f"{path / SUMMARY}: {size} is {value}")
    if len(class_labels) != max(2, sizes["output_size"]):
        raise RunError(f"{path / SUMMARY}: {len(class_labels)} class labels for {sizes['output_size']} logits")
    if len(feature_names) != sizes["input_size"]:
        raise RunError(f"{path / SUMMARY}: {len(feature_names)} feature names for {sizes['input_size']} features")
    if architecture not in CELLS:
        raise RunError(f"{path / SUMMARY}: architecture is {architecture!r}, expected one of {', '.join(CELLS)}")
    model = build(CELLS[architecture], **sizes, nonlinearity=nonlinearity)
    _load_weights(model, path / WEIGHTS)
    return TrainedRun(model.eval(), class_labels, feature_names, summary)


def _load_weights(model: RecurrentClassifier[Any], file: Path) -> None:
    try:
        weights: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file}: not readable as safetensors: {error}") from error
    expected = model.state_dict()
    if weights.keys() != expected.keys():
        raise RunError(f"{file}: holds {sorted(weights)}, expected {sorted(expected)}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape or tensor.dtype != torch.float32:
            wanted = tuple(expected[name].shape)
            raise RunError(f"{file}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected float32 {wanted}")
        if not tensor.isfinite().all():
            raise RunError(f"{file}: {name} holds values that are not finite")
    if not (weights["std"] > 0).all():
        raise RunError(f"{file}: std holds values that are not positive")
    model.load_state_dict(weights)
