"""The proof refuses no trained network that its artifacts compute correctly."""

import random
from collections.abc import Callable

import pytest
import torch
from support.models import random_network
from torch import Tensor

from unroll_export import SimpleRNN
from unroll_export.datasets import Dataset, Part
from unroll_export.exporting import BUILDERS
from unroll_export.parity.gate import prove
from unroll_export.training import Hyperparameters, Trainer

SETTINGS = 40
SIZES = [(1, 1), (1, 40), (2, 3), (3, 17), (5, 64), (7, 7), (9, 33), (13, 20), (16, 16), (20, 5)]
SIZES += [(24, 24), (31, 8), (40, 2), (50, 50), (64, 12), (80, 30), (100, 10), (128, 16), (256, 8), (512, 4)]


def dataset(means: Tensor, scales: Tensor, classes: int, lengths: tuple[int, int], seed: int) -> Dataset:
    """Makes sequences whose features have different means and scales, and depend on the class."""
    generator = torch.Generator().manual_seed(seed)
    shifts = 2 * torch.randn(classes, len(means), generator=generator)

    def part(count: int) -> Part:
        labels = torch.arange(count) % classes
        steps = torch.randint(lengths[0], lengths[1] + 1, (count,), generator=generator).tolist()
        values = [
            means + scales * (torch.randn(length, len(means), generator=generator) + shifts[label])
            for length, label in zip(steps, labels, strict=True)
        ]
        return Part(values, labels)

    names = tuple(f"f{index}" for index in range(len(means)))
    return Dataset("made", "0" * 64, tuple(map(str, range(classes))), names, part(24), part(8), part(8))


def check_that_it_exports(data: Dataset, how: Hyperparameters) -> None:
    trainer = Trainer(data, how)
    while not trainer.finished:
        trainer.run_epoch()
    model = trainer.model.eval()
    assert isinstance(model, SimpleRNN)
    prove(model, {kind: build(model) for kind, build in BUILDERS.items()})


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
    features, scale = rng.choice([1, 4, 12]), rng.choice([1e-6, 1.0, 1e6])
    scales = scale * 10 ** torch.randint(-2, 3, (features,), generator=torch.Generator().manual_seed(seed))
    check_that_it_exports(dataset(scales, scales, classes=2, lengths=(2, 9), seed=seed), how)


@pytest.mark.parametrize("seed", [0, 3, 4])
def test_spoken_digits_export(seed: int) -> None:
    """Makes cepstra: the first one is large and far from 0, and sequences have 6 to 92 steps."""
    means, scales = torch.zeros(13), 40 / (1 + torch.arange(13.0))
    means[0], scales[0] = -350, 120
    data = dataset(means, scales, classes=10, lengths=(6, 92), seed=seed)
    check_that_it_exports(data, Hyperparameters(epochs=8, seed=seed))


def test_a_network_with_large_logits_exports() -> None:
    data = dataset(torch.zeros(4), torch.ones(4), classes=3, lengths=(2, 30), seed=0)
    check_that_it_exports(data, Hyperparameters(epochs=8, learning_rate=0.3, weight_decay=0.0))


Change = Callable[[Tensor], object]
CHANGES: dict[str, Change] = {
    "as it is": lambda weight: weight,
    "large": lambda weight: weight.mul_(1000),
    "tiny": lambda weight: weight.mul_(1e-5),
    "none": lambda weight: weight.zero_(),
    "equal": lambda weight: weight.fill_(0.3),
    "few": lambda weight: weight.mul_(torch.rand_like(weight) < 0.1),
    "one large": lambda weight: weight.mul_(1e-4).view(-1)[0].fill_(30),
    "of all sizes": lambda weight: weight.mul_(10 ** torch.empty_like(weight).uniform_(-5, 1)),
}


@pytest.mark.parametrize("seed", range(12))
def test_a_network_of_unlikely_weights_exports(seed: int) -> None:
    """Networks with terms that vanish beside others, sums that hardly change, or extreme dynamics."""
    rng = random.Random(seed)  # noqa: S311
    network = random_network(rng.choice([1, 5]), rng.choice([1, 3, 8]), rng.choice([1, 9]), rng.choice([1, 2]), seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in network.parameters():
            CHANGES[rng.choice(list(CHANGES))](parameter)
    prove(network, {kind: build(network) for kind, build in BUILDERS.items()})


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_an_untrained_model_of_any_size_exports(sizes: tuple[int, int]) -> None:
    network = random_network(*sizes, 3)
    prove(network, {kind: build(network) for kind, build in BUILDERS.items()})
