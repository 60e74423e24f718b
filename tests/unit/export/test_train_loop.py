"""Training: the loss of the last step, early stopping, binary and stacked models, reproducible bits."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unroll_export import SimpleRNN, sources
from unroll_export.datasets import Dataset, Part
from unroll_export.metrics import evaluate, loss_of, predict
from unroll_export.training import Hyperparameters, Trainer, TrainingError

QUICK = Hyperparameters(hidden_size=8, epochs=6, batch_size=8)


def dataset(classes: int = 3, sequences: int = 36, seed: int = 0) -> Dataset:
    """Makes sequences of 1 to 9 steps whose mean shows the class."""
    random = torch.Generator().manual_seed(seed)

    def part(count: int) -> Part:
        labels = torch.arange(count) % classes
        lengths = torch.randint(1, 10, (count,), generator=random).tolist()
        return Part(
            [torch.randn(n, 2, generator=random) + 2 * int(c) for n, c in zip(lengths, labels, strict=True)], labels
        )

    labels = tuple(str(i) for i in range(classes))
    return Dataset("made", "0" * 64, labels, ("x", "y"), part(sequences), part(12), part(12))


def trained(data: Dataset, how: Hyperparameters) -> Trainer:
    trainer = Trainer(data, how)
    while not trainer.finished:
        trainer.run_epoch()
    return trainer


def bits(weights: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


@given(data=st.data())
@settings(max_examples=25)
def test_what_follows_a_sequences_end_changes_no_gradient(data: st.DataObject) -> None:
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)))
    layers = data.draw(st.integers(1, 2))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    model = SimpleRNN(2, 5, 3, layers)
    labels = torch.arange(len(lengths)) % 3
    x = torch.randn(len(lengths), int(lengths.max()) + data.draw(st.integers(0, 3)), 2)
    after_end = torch.arange(x.shape[1])[None, :] >= lengths[:, None]
    gradients = []
    for filling in (0.0, 1e3):
        padded = x.masked_fill(after_end[..., None], filling).requires_grad_()
        loss = loss_of(model(padded, lengths), labels)
        gradients.append(torch.autograd.grad(loss, (padded, *model.parameters())))
    assert not gradients[0][0][after_end].any()
    assert gradients[0][0][torch.arange(len(lengths)), lengths - 1].any(1).all()
    for with_zeros, with_garbage in zip(*gradients, strict=True):
        assert torch.equal(with_zeros, with_garbage)


def test_the_loss_is_of_each_sequences_own_last_step() -> None:
    torch.manual_seed(0)
    model, data = SimpleRNN(2, 8, 3), dataset()
    x, lengths, labels = data.train.batch(torch.arange(20))
    one_by_one = [model.unroll(data.train.sequences[i][None])[0][0, -1] for i in range(20)]
    expected = torch.nn.functional.cross_entropy(torch.stack(one_by_one), labels)
    torch.testing.assert_close(loss_of(model(x, lengths), labels), expected)


def test_a_seed_fixes_every_bit_and_another_seed_gives_others() -> None:
    data = dataset()
    first = trained(data, QUICK)
    torch.manual_seed(99)  # independent of the global random state
    second, other = trained(data, QUICK), trained(data, replace(QUICK, seed=1))
    assert bits(first.best_weights) == bits(second.best_weights) != bits(other.best_weights)
    assert first.history == second.history
    assert first.flows == second.flows


def test_training_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    trained(dataset(), QUICK)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_restored_trainer_ends_with_the_same_bits(stop_after: int) -> None:
    data = dataset()
    whole, half = trained(data, QUICK), Trainer(data, QUICK)
    for _ in range(stop_after):
        half.run_epoch()
    resumed = Trainer(data, QUICK)
    resumed.restore(half.state())
    while not resumed.finished:
        resumed.run_epoch()
    assert bits(resumed.best_weights) == bits(whole.best_weights)
    assert bits(resumed.finish().state_dict()) == bits(whole.finish().state_dict())
    assert (resumed.history, resumed.flows) == (whole.history, whole.flows)


def test_it_learns_and_keeps_the_weights_of_the_lowest_validation_loss() -> None:
    data = dataset()
    trainer = trained(data, replace(QUICK, epochs=40, learning_rate=0.01, patience=100))
    best = min(trainer.history, key=lambda row: row["validation_loss"])
    assert trainer.best_epoch == best["epoch"]
    evaluation = evaluate(trainer.finish(), data.validation, 3)
    assert evaluation.loss == best["validation_loss"]
    assert evaluation.accuracy == best["validation_accuracy"]
    assert evaluate(trainer.model, data.test, 3).accuracy > 0.9


def test_it_stops_once_the_patience_is_used_up() -> None:
    data = dataset()
    # Wrong labels: the loss grows as the training part is learned.
    wrong = replace(data, validation=Part(data.train.sequences, (data.train.labels + 1) % 3))
    trainer = trained(wrong, replace(QUICK, epochs=100, patience=3, learning_rate=0.01))
    assert trainer.epoch == trainer.best_epoch + 3 < 100


def test_without_a_validation_part_it_runs_to_the_end_and_keeps_the_last_weights() -> None:
    data = replace(dataset(), validation=Part([], torch.zeros(0, dtype=torch.int64)))
    trainer = trained(data, replace(QUICK, patience=1))
    assert trainer.epoch == trainer.best_epoch == QUICK.epochs
    assert "validation_loss" not in trainer.history[-1]
    weights = bits(trainer.model.state_dict())
    assert bits(trainer.finish().state_dict()) == weights


def test_two_classes_train_one_logit() -> None:
    data = dataset(classes=2)
    trainer = trained(data, replace(QUICK, epochs=30, learning_rate=0.01))
    model = trainer.finish()
    assert model.fc.out_features == 1
    x, lengths, labels = data.test.batch(torch.arange(12))
    with torch.no_grad():
        logits = model(x, lengths)
    p = torch.sigmoid(logits[:, 0])
    expected = -torch.where(labels == 1, p, 1 - p).log().mean()
    torch.testing.assert_close(loss_of(logits, labels), expected)
    assert torch.equal(predict(logits), (p > 0.5).long())
    evaluation = evaluate(model, data.test, 2)
    assert evaluation.accuracy > 0.9
    assert evaluation.confusion.sum(1).tolist() == [6, 6]


def test_layers_carry_through() -> None:
    trainer = trained(dataset(), replace(QUICK, num_layers=3))
    assert trainer.model.rnn.num_layers == 3
    before = Trainer(dataset(), replace(QUICK, num_layers=3)).model.state_dict()
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == before.keys() - {"mean", "std"}
    assert len(trainer.flows[-1].spectral_radius) == 3


def test_standardization_stays_out_of_training() -> None:
    data = dataset()
    mean, std = data.standardization()
    model = trained(data, QUICK).finish()
    assert torch.equal(model.mean, mean)
    assert torch.equal(model.std, std)


def test_gradients_are_clipped_and_their_norm_before_it_is_told() -> None:
    loose = trained(dataset(), replace(QUICK, epochs=1, batch_size=100, clip=1e9))
    tight = trained(dataset(), replace(QUICK, epochs=1, batch_size=100, clip=1e-12))
    assert tight.history[0]["gradient_norm"] == loose.history[0]["gradient_norm"] > 1e-3
    start = Trainer(dataset(), QUICK).best_weights["fc.weight"]
    moved = [float((run.best_weights["fc.weight"] - start).abs().max()) for run in (loose, tight)]
    # AdamW divides by the gradient's size plus 1e-8, which is far above the clipped gradient.
    assert moved[1] < 0.1 * moved[0]


def test_divergence_ends_the_run_with_the_reason() -> None:
    data = dataset()
    data.train.sequences[5][0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"epoch 1: the loss is nan .* --lr"):
        Trainer(data, QUICK).run_epoch()


@pytest.mark.parametrize(("lag", "lowest", "highest"), [(2, 0.99, 1.0), (60, 0.0, 0.25)])
def test_recall_is_learned_over_a_few_steps_and_not_over_many(lag: int, lowest: float, highest: float) -> None:
    data = sources.recall(lag=lag, seed=0)
    trainer = trained(data, Hyperparameters(hidden_size=32, epochs=15, learning_rate=0.005, input_noise=0.2))
    assert lowest <= evaluate(trainer.finish(), data.test, 8).accuracy <= highest
    # Before training, the gradient at the first step is a vanishing share of that at the last step.
    decay = trainer.flows[0].decay(lag)
    assert decay is not None
    assert (decay > 9) == (lag == 60)
