"""Whatever trains is exported: the proof refuses no network that its artifacts compute rightly."""

import random

import pytest
import torch
from support.models import random_network

from unroll_export.datasets import Dataset, Part
from unroll_export.exporting import BUILDERS
from unroll_export.parity.gate import prove
from unroll_export.training import Hyperparameters, Trainer

SETTINGS = 40
SIZES = [(1, 1), (1, 40), (2, 3), (3, 17), (5, 64), (7, 7), (9, 33), (13, 20), (16, 16), (20, 5)]
SIZES += [(24, 24), (31, 8), (40, 2), (50, 50), (64, 12), (80, 30), (100, 10), (128, 16), (256, 8), (512, 4)]


def dataset(features: int, scale: float, seed: int) -> Dataset:
    """Two classes of sequences of 2 to 9 steps, whose features have very different scales."""
    generator = torch.Generator().manual_seed(seed)
    scales = scale * 10 ** torch.randint(-2, 3, (features,), generator=generator)

    def part(count: int) -> Part:
        labels = torch.arange(count) % 2
        lengths = torch.randint(2, 10, (count,), generator=generator).tolist()
        values = [
            scales * (torch.randn(length, features, generator=generator) + 2 * int(label))
            for length, label in zip(lengths, labels, strict=True)
        ]
        return Part(values, labels)

    names = tuple(f"f{index}" for index in range(features))
    return Dataset("made", "0" * 64, ("a", "b"), names, part(24), part(8), part(8))


@pytest.mark.parametrize("seed", range(SETTINGS))
def test_a_model_of_any_accuracy_exports(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311 (settings, not secrets)
    how = Hyperparameters(
        hidden_size=rng.choice([2, 8, 24]),
        num_layers=rng.choice([1, 1, 2]),
        epochs=rng.choice([1, 5]),
        batch_size=8,
        learning_rate=rng.choice([1e-4, 0.01, 0.3, 1.0]),
        weight_decay=rng.choice([0.0, 0.1]),
        clip=rng.choice([1.0, 100.0]),
        input_noise=rng.choice([0.0, 0.5]),
        seed=seed,
    )
    trainer = Trainer(dataset(rng.choice([1, 4, 12]), rng.choice([1e-6, 1.0, 1e6]), seed), how)
    while not trainer.finished:
        trainer.run_epoch()
    model = trainer.model.eval()
    prove(model, {kind: build(model) for kind, build in BUILDERS.items()})


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_an_untrained_model_of_any_size_exports(sizes: tuple[int, int]) -> None:
    network = random_network(*sizes, 3)
    prove(network, {kind: build(network) for kind, build in BUILDERS.items()})
