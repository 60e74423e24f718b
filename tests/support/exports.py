"""Training runs without training: the input of export for any network."""

import json
from pathlib import Path
from typing import Any

from unroll_export.model import RecurrentClassifier
from unroll_export.runs import FORMAT, SUMMARY, WEIGHTS, TrainedRun, save_weights


def run_of(network: RecurrentClassifier[Any], longest_sequence: int = 20, **changes: Any) -> TrainedRun:
    """Makes a finished run of `network`."""
    outputs, features = network.fc.out_features, network.rnn.input_size
    summary: dict[str, Any] = {
        "format": FORMAT,
        "data": "made-up.npz",
        "data_sha256": "ab" * 32,
        "seed": 7,
        "epochs": 3,
        "training_sequences": 11,
        "longest_sequence": longest_sequence,
        "test_accuracy": 0.75,
        "class_labels": [f"class {index}" for index in range(max(outputs, 2))],
        "feature_names": [f"feature {index}" for index in range(features)],
        "input_size": features,
        "hidden_size": network.rnn.hidden_size,
        "output_size": outputs,
        "architecture": network.architecture,
        "num_layers": network.rnn.num_layers,
    } | changes
    return TrainedRun(network, tuple(summary["class_labels"]), tuple(summary["feature_names"]), summary)


def write_run(run: TrainedRun, folder: Path) -> Path:
    """Writes the files of a run; returns the folder."""
    folder.mkdir(parents=True)
    save_weights(run.model, folder / WEIGHTS)
    (folder / SUMMARY).write_text(json.dumps(run.summary), encoding="utf-8")
    return folder
