"""A training run in its folder: starts or resumes it, saves checkpoints, and writes weights and summary at the end."""

import json
import pickle
import platform
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.tensorboard import SummaryWriter

from unroll_export import runs
from unroll_export.datasets import Dataset
from unroll_export.diagnosis import diagnose
from unroll_export.metrics import evaluate
from unroll_export.runs import RunError, replaced
from unroll_export.training import Hyperparameters, Trainer

LIBRARIES = ("torch", "numpy", "safetensors", "tensorboard", "unroll-export", "unroll-proto")

Start = Literal["new", "resume", "overwrite"]


def run(
    data: Dataset,
    settings: Hyperparameters,
    out: Path,
    start: Start = "new",
    on_epoch: Callable[[dict[str, float]], None] = lambda _: None,
) -> dict[str, Any]:
    """Trains a model in the folder `out` and writes the files of a run.

    Args:
        data: The data.
        settings: The settings.
        out: The run folder; created once the input has been checked.
        start: "new" requires a missing or empty folder. "overwrite" also removes a run that is in it. "resume"
            continues from the last checkpoint, starts if there is none, and does nothing if the run has finished.
        on_epoch: Called with the figures of each epoch, on resuming also with those of earlier epochs.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        RunError: the folder holds other files, or a run with other data or settings.
        TrainingError: training diverged; the folder keeps the last checkpoint.
    """
    settings = settings.resolved(data)
    identity = {
        "data": data.name,
        "data_parameters": data.parameters,
        "data_sha256": data.sha256,
        "hyperparameters": asdict(settings),
    }
    _check_folder(out, start)
    if start == "resume" and (out / runs.SUMMARY).is_file():
        summary = runs.load_summary(out)
        _check_identity(out, summary, identity)
        return summary
    trainer = Trainer(data, settings)
    if start == "resume" and (out / runs.CHECKPOINT).is_file():
        checkpoint = _read_checkpoint(out / runs.CHECKPOINT)
        _check_identity(out, checkpoint["identity"], identity)
        trainer.restore(checkpoint["trainer"])
    else:
        out.mkdir(parents=True, exist_ok=True)
        _remove_run(out)
    for figures in trainer.history:
        on_epoch(figures)
    # Written first, so that a folder with a run always has a checkpoint.
    _write_checkpoint(out, trainer, identity)
    # Steps that a killed run logged after its last checkpoint are dropped.
    writer = SummaryWriter(str(out), purge_step=trainer.epoch + 1)
    try:
        while not trainer.finished:
            figures = trainer.run_epoch()
            _log_epoch(writer, trainer, figures)
            _write_checkpoint(out, trainer, identity)
            on_epoch(figures)
        summary = summarize(trainer) | identity
        writer.add_scalar(f"accuracy/{summary['judged_on']}", summary["accuracy"], trainer.epoch)
    finally:
        writer.close()
    runs.save_weights(trainer.model, out / runs.WEIGHTS)
    # The summary comes last: if it exists, the run is complete.
    with replaced(out / runs.SUMMARY) as partial:
        partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def summarize(trainer: Trainer) -> dict[str, Any]:
    """Restores the best weights and returns the content of `summary.json`.

    `accuracy`, `confusion_matrix` (rows are true classes) and `per_class` are of the split `judged_on`: test, or where
    there is none validation, or where there is neither train. `majority_accuracy` is that of always predicting the
    most frequent class of that split. `splits` has sequence count, loss and accuracy of each. `warnings` are those of
    `diagnosis.diagnose`.
    """
    data = trainer.data
    model = trainer.finish()
    parts = {"test": data.test, "validation": data.validation, "train": data.train}
    evaluations = {name: evaluate(model, part, trainer.classes) for name, part in parts.items() if len(part)}
    judged_on = next(iter(evaluations))
    judged = evaluations[judged_on]
    return {
        "format": runs.FORMAT,
        "architecture": model.architecture,
        "nonlinearity": trainer.settings.nonlinearity if trainer.settings.cell == "rnn" else None,
        "judged_on": judged_on,
        "accuracy": judged.accuracy,
        "majority_accuracy": judged.majority,
        "macro_f1": judged.macro_f1,
        "warnings": diagnose(
            judged,
            evaluations["train"],
            trainer.flows[-1],
            data.median_length,
            data.class_labels,
            gated=trainer.settings.cell != "rnn",
        ),
        "test_accuracy": evaluations["test"].accuracy if "test" in evaluations else None,
        "confusion_matrix": judged.confusion.tolist(),
        "per_class": judged.per_class(data.class_labels),
        "splits": {
            name: {"sequences": len(parts[name]), "loss": evaluation.loss, "accuracy": evaluation.accuracy}
            for name, evaluation in evaluations.items()
        },
        "class_labels": list(data.class_labels),
        "feature_names": list(data.feature_names),
        "input_size": model.rnn.input_size,
        "hidden_size": model.rnn.hidden_size,
        "output_size": model.fc.out_features,
        "num_layers": model.rnn.num_layers,
        "training_sequences": len(data.train),
        "validation_sequences": len(data.validation),
        "test_sequences": len(data.test),
        "longest_sequence": data.longest_sequence,
        "seed": trainer.settings.seed,
        "epochs": trainer.epoch,
        "best_epoch": trainer.best_epoch,
        "history": trainer.history,
        "gradient_flow": [flow.as_json() for flow in trainer.flows],
        "libraries": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _check_folder(out: Path, start: Start) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise RunError(f"{out}: is not a folder")
    finished = (out / runs.SUMMARY).is_file()
    if not finished and not (out / runs.CHECKPOINT).is_file():
        foreign = [path.name for path in out.iterdir() if not path.name.endswith(".partial")]
        if foreign:
            raise RunError(f"{out}: holds {sorted(foreign)[0]!r} but no training run; give a new or an empty folder")
    elif start == "new" and finished:
        raise RunError(f"{out}: holds a finished run; --overwrite replaces it")
    elif start == "new":
        raise RunError(f"{out}: holds an unfinished run; --resume continues it, --overwrite replaces it")


def _check_identity(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compares the data and settings of a run with those to continue with."""

    def flat(identity: dict[str, Any]) -> dict[str, Any]:
        return {
            "data": identity.get("data"),
            **identity.get("data_parameters", {}),
            **asdict(Hyperparameters()),
            **identity.get("hyperparameters", {}),
            "data_sha256": identity.get("data_sha256"),
        }

    old, new = flat(before), flat(now)
    for name in old | new:
        if old.get(name) != new.get(name):
            raise RunError(
                f"{out}: the run began with {name} {old.get(name)}, not {new.get(name)}; --resume continues with the "
                "same data and settings only"
            )


def _remove_run(out: Path) -> None:
    """Removes a run's files and nothing else; the summary first, so that no partial run looks complete."""
    for name in (runs.SUMMARY, runs.WEIGHTS, runs.REPORT, runs.EVENTS, runs.CHECKPOINT, ".*.partial"):
        for path in out.glob(name):
            path.unlink()


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{path}: not readable as a checkpoint ({reason}); --overwrite starts again") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != runs.FORMAT:
        raise RunError(f"{path}: not a checkpoint of format {runs.FORMAT}")
    return checkpoint


def _write_checkpoint(out: Path, trainer: Trainer, identity: dict[str, Any]) -> None:
    with replaced(out / runs.CHECKPOINT) as partial:
        torch.save({"format": runs.FORMAT, "identity": identity, "trainer": trainer.state()}, partial)


def _log_epoch(writer: SummaryWriter, trainer: Trainer, figures: dict[str, float]) -> None:
    """Writes the epoch's figures to TensorBoard and to disk."""
    for name, figure in figures.items():
        if name != "epoch":
            part, _, kind = name.rpartition("_")
            tag = f"{kind}/{part}" if kind in ("loss", "accuracy") else name
            writer.add_scalar(tag, figure, trainer.epoch)
    flow = trainer.flows[-1]
    if flow.epoch == trainer.epoch:
        for layer, radius in enumerate(flow.spectral_radius):
            writer.add_scalar(f"spectral_radius/layer_{layer}", radius, trainer.epoch)
        for end, log10_norm in (("last", flow.log10_norms[0]), ("first", flow.log10_norms[-1])):
            if log10_norm is not None:
                writer.add_scalar(f"gradient_flow_log10/{end}_step", log10_norm, trainer.epoch)
    writer.flush()
