"""Training by backpropagation through time: epochs, early stopping, and the state between epochs."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unroll_export import gradient_flow
from unroll_export.datasets import Dataset
from unroll_export.gradient_flow import GradientFlow
from unroll_export.metrics import balanced_weights, evaluate, loss_of, predict
from unroll_export.model import Cell, Nonlinearity, RecurrentClassifier, build, initialize_memory

# Timesteps, padding included, of the training sequences on which the gradient flow is measured.
FLOW_STEPS = 8192
LEAST_EPOCHS, LEAST_STEPS = 150, 2400


class TrainingError(RuntimeError):
    """Training can't continue; the message is one line with the reason."""


@dataclass(frozen=True)
class Hyperparameters:
    """Settings that determine, together with the data, every bit of the trained weights.

    Attributes:
        cell: Recurrent cell: Elman's, LSTM or GRU.
        nonlinearity: Nonlinearity of the "rnn" cell.
        hidden_size: Width of the hidden state of one layer.
        num_layers: Stacked recurrent layers.
        dropout: Probability of zeroing an input of a layer above the first, in training.
        epochs: Most epochs; the learning rate falls to 0 over them, along half a cosine. If None, 150, or enough for
            2,400 steps of the optimizer.
        batch_size: Sequences of one step of the optimizer.
        learning_rate: Initial learning rate of AdamW. If None, 0.002, or 0.005 for a cell with gates.
        weight_decay: Weight decay of AdamW.
        clip: Largest norm of the gradient of all weights together.
        class_weights: "balanced" weighs each class in the loss by the inverse of its frequency.
        input_noise: Standard deviation of the normal noise added to training inputs, in units of each feature's.
        patience: Epochs without a lower validation loss after which training stops. If None, 4 / 15 of `epochs`.
        validation_fraction: Share of the training sequences held out for early stopping; 0 trains for all epochs.
        test_fraction: Share held out as the test split if the data has none.
        seed: Seed of the initial weights, the held-out sequences, the order of the batches and the noise.
        threads: Threads of torch; their number can change the rounding of sums.
    """

    cell: Cell = "rnn"
    nonlinearity: Nonlinearity = "tanh"
    hidden_size: int = 128
    num_layers: int = 1
    dropout: float = 0.0
    epochs: int | None = None
    batch_size: int = 16
    learning_rate: float | None = None
    weight_decay: float = 0.1
    clip: float = 1.0
    class_weights: Literal["none", "balanced"] = "none"
    input_noise: float = 0.5
    patience: int | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.2
    seed: int = 0
    threads: int = 1

    def resolved(self, data: Dataset) -> "Hyperparameters":
        """Replaces missing settings by defaults for the cell and the data."""
        epochs = self.epochs or max(LEAST_EPOCHS, math.ceil(LEAST_STEPS / math.ceil(len(data.train) / self.batch_size)))
        return replace(
            self,
            epochs=epochs,
            learning_rate=self.learning_rate or (0.002 if self.cell == "rnn" else 0.005),
            patience=self.patience or math.ceil(epochs * 4 / 15),
        )


class Trainer:
    """A training run between two epochs.

    `state()` and `restore()` carry everything that determines the rest of the run, so that a resumed run ends with the
    same bits. The global random state of torch is neither read nor changed.

    Args:
        data: The data.
        settings: The settings; the caller applies `threads`.

    Attributes:
        settings: The settings, with defaults for the data.
        most_epochs: Epochs after which training ends.
        epoch: Epochs done.
        best_epoch: The epoch with the lowest validation loss so far; the last one without a validation part.
        history: Figures of each epoch.
        flows: The gradient flow before training and after epochs 1, 2, 5, 10, 20, 50...
    """

    def __init__(self, data: Dataset, settings: Hyperparameters) -> None:
        self.data = data
        self.settings = settings = settings.resolved(data)
        assert settings.epochs and settings.patience  # noqa: PT018
        assert settings.learning_rate
        self.most_epochs, self._patience = settings.epochs, settings.patience
        self._first_rate = settings.learning_rate
        self.classes = len(data.class_labels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = build(
                settings.cell,
                len(data.feature_names),
                settings.hidden_size,
                1 if self.classes == 2 else self.classes,
                settings.num_layers,
                settings.dropout,
                settings.nonlinearity,
            )
            initialize_memory(self.model, data.longest_sequence)
        mean, std = data.standardization()
        self.model.mean.copy_(mean)
        self.model.std.copy_(std)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self._first_rate, weight_decay=settings.weight_decay
        )
        balanced = settings.class_weights == "balanced"
        self._class_weights = balanced_weights(data.train.labels, self.classes) if balanced else None
        self.random = torch.Generator().manual_seed(settings.seed)
        self.epoch = 0
        self.best_epoch = 0
        self.best_loss = math.inf
        self.best_weights = self._weights()
        self.history: list[dict[str, float]] = []
        self.flows: list[GradientFlow] = [self._measure_flow(0)]

    @property
    def finished(self) -> bool:
        """True if the epochs or the patience are used up."""
        waited = self.epoch - self.best_epoch
        return self.epoch >= self.most_epochs or waited >= self._patience

    def run_epoch(self) -> dict[str, float]:
        """Trains on every training sequence once and evaluates the model on the validation part.

        Returns:
            The figures of the epoch, also added to `history`. Loss and accuracy of the training part are those of the
            training batches, noise included.

        Raises:
            TrainingError: the loss or the gradient is not finite.
        """
        order = torch.randperm(len(self.data.train), generator=self.random)
        batches = [order[i : i + self.settings.batch_size] for i in range(0, len(order), self.settings.batch_size)]
        loss = norm = 0.0
        correct = 0
        self.model.train()
        with self._seeded_dropout():
            for i, indices in enumerate(batches):
                learning_rate = self._learning_rate(self.epoch + i / len(batches))
                batch_loss, batch_norm, hits = self._step(self.data.train.batch(indices), learning_rate)
                loss += batch_loss * len(indices) / len(order)
                norm += batch_norm / len(batches)
                correct += hits
        self.model.eval()
        self.epoch += 1
        figures = {
            "epoch": self.epoch,
            "train_loss": loss,
            "train_accuracy": correct / len(order),
            "gradient_norm": norm,
            "learning_rate": learning_rate,
        }
        self._judge(figures)
        self.history.append(figures)
        if _is_milestone(self.epoch):
            self.flows.append(self._measure_flow(self.epoch))
        return figures

    def finish(self) -> RecurrentClassifier[Any]:
        """Restores the best weights, whose gradient flow becomes the last one; returns the model in eval mode."""
        self.model.load_state_dict(self.best_weights)
        self.flows.append(self._measure_flow(self.best_epoch))
        return self.model.eval()

    def state(self) -> dict[str, Any]:
        """Returns everything that changes with an epoch, as tensors and plain values."""
        return {
            "epoch": self.epoch,
            "weights": self._weights(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.get_state(),
            "best_epoch": self.best_epoch,
            "best_loss": self.best_loss,
            "best_weights": self.best_weights,
            "history": self.history,
            "flows": [flow.as_json() for flow in self.flows],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restores a `state` of a run with the same data and settings."""
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.set_state(state["random"])
        self.best_epoch = state["best_epoch"]
        self.best_loss = state["best_loss"]
        self.best_weights = state["best_weights"]
        self.history = state["history"]
        self.flows = [GradientFlow(**flow) for flow in state["flows"]]

    @contextmanager
    def _seeded_dropout(self) -> Iterator[None]:
        """Seeds torch's global generator, which dropout uses, in the context; restores it afterwards."""
        if not self.settings.dropout:
            yield
            return
        seed = int(torch.randint(2**62, (), generator=self.random))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield

    def _step(self, batch: tuple[Tensor, Tensor, Tensor], learning_rate: float) -> tuple[float, float, int]:
        """Makes one step of the optimizer; returns the loss, the gradient's norm before clipping, and the hits."""
        x, lengths, labels = batch
        if self.settings.input_noise:
            noise = torch.randn(x.shape, generator=self.random)
            x = x + self.settings.input_noise * self.model.std * noise
        logits = self.model(x, lengths)
        loss = loss_of(logits, labels, weights=self._class_weights)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        loss = loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        if not (loss.isfinite() and norm.isfinite()):
            raise TrainingError(
                f"epoch {self.epoch + 1}: the loss is {float(loss):g} and its gradient's norm {float(norm):g}: "
                "training diverged; a lower --lr may help"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return float(loss), float(norm), int((predict(logits) == labels).sum())

    def _judge(self, figures: dict[str, float]) -> None:
        """Adds the validation figures and keeps the weights if they are the best so far."""
        if len(self.data.validation):
            validation = evaluate(self.model, self.data.validation, self.classes)
            figures |= {"validation_loss": validation.loss, "validation_accuracy": validation.accuracy}
            if not validation.loss < self.best_loss:
                return
            self.best_loss = validation.loss
        self.best_epoch = self.epoch
        self.best_weights = self._weights()

    def _measure_flow(self, epoch: int) -> GradientFlow:
        """Measures the gradient flow on a fixed set of training sequences."""
        count = min(max(8, FLOW_STEPS // self.data.longest_sequence), len(self.data.train))
        indices = torch.linspace(0, len(self.data.train) - 1, count).long()
        return gradient_flow.measure(self.model, self.data.train.batch(indices), epoch)

    def _learning_rate(self, epochs: float) -> float:
        return self._first_rate * (1 + math.cos(math.pi * epochs / self.most_epochs)) / 2

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}


def _is_milestone(epoch: int) -> bool:
    """Returns True if the epoch is 1, 2 or 5 times a power of ten."""
    while epoch % 10 == 0:
        epoch //= 10
    return epoch in (1, 2, 5)
