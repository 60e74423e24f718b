"""Models of the soak, and the expected answers of each version, computed alone."""

import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from support.eager import TOLERANCE
from support.exports import run_of
from support.models import alone, default_runtime, random_network, served

from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array
from unroll_export.exporting import export_run
from unroll_proto.bundle import ONNX_RNN

NAME = "soak"
FEATURES, HIDDEN, CLASSES = 6, 48, 5
VERSIONS = 4
"""Versions that are added and removed; the first stays."""
LONGEST = 60
"""Steps of the longest sequence that is classified."""


class Oracle:
    """Bundles of `VERSIONS` networks, with proof, and their answers.

    Args:
        folder: Folder of the bundles: `pool/` has all of them, `models/` is the repository that servers watch.
    """

    def __init__(self, folder: Path) -> None:
        self.pool = folder / "pool"
        self.models = folder / "models"
        for version in range(1, VERSIONS + 1):
            network = random_network(FEATURES, HIDDEN, CLASSES, seed=version)
            export_run(run_of(network, longest_sequence=LONGEST), self.pool / NAME)
        self.add(1)
        self._model = cache(self._load)

    def add(self, version: int, broken: bool = False) -> None:
        """Publishes a version in the repository; a broken one has wrong checksums."""
        target = self.models / NAME / str(version)
        target.parent.mkdir(parents=True, exist_ok=True)
        neighbour = Path(tempfile.mkdtemp(prefix=".", dir=self.models))
        bundle = shutil.copytree(self.pool / NAME / str(version), neighbour / "bundle")
        if broken:
            artifact = bundle / ONNX_RNN
            artifact.write_bytes(artifact.read_bytes()[::-1])
        bundle.rename(target)
        neighbour.rmdir()

    def remove(self, version: int) -> None:
        """Removes a version from the repository."""
        neighbour = Path(tempfile.mkdtemp(prefix=".", dir=self.models))
        (self.models / NAME / str(version)).rename(neighbour / "bundle")
        shutil.rmtree(neighbour)

    def answer(self, version: int, values: Float32Array) -> tuple[Float32Array, Float32Array]:
        """Returns logits [steps, CLASSES] and states [steps, HIDDEN] of a sequence [steps, FEATURES] run alone."""
        logits, states, _ = alone(self._model(version), values, None)
        return logits, states

    def _load(self, version: int) -> Model:
        network = random_network(FEATURES, HIDDEN, CLASSES, seed=version)
        content = (self.pool / NAME / str(version) / ONNX_RNN).read_bytes()
        model = served(network, NAME, version, default_runtime(content))
        # The expected answers are themselves compared with eager PyTorch.
        values = np.random.default_rng(version).standard_normal((LONGEST, FEATURES), np.float32)
        with torch.inference_mode():
            expected = network.unroll(torch.from_numpy(values)[None])[0][0].numpy()
        assert np.abs(alone(model, values, None)[0] - expected).max() <= TOLERANCE
        return model
