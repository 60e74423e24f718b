"""`model.ts`: a recurrent classifier as TorchScript, batch-major.

TorchScript is deprecated upstream since torch 2.11, and warns at every call. It stays supported here for programs
that load it. Only `quiet` silences the warning.
"""

import copy
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from unroll_export.graphs.tensors import state_names
from unroll_export.model import RecurrentClassifier


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the deprecation warning of torch.jit, and nothing else, in the context."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        yield


class Unrolled(nn.Module):
    """The `unroll` of a classifier with one state tensor as a module's `forward`, under the artifacts' names."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: RecurrentClassifier[Any]) -> None:
        super().__init__()
        self.rnn = model.rnn
        self.fc = model.fc
        self.register_buffer("mean", model.mean)
        self.register_buffer("std", model.std)

    def forward(self, input: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: A002
        """Returns `logits`, `states`, `final_state`; see RecurrentClassifier.unroll for the shapes."""
        states, final_state = self.rnn((input - self.mean) / self.std, initial_state)
        return self.fc(states), states, final_state


class UnrolledLSTM(Unrolled):
    """The `unroll` of an LSTM classifier as a module's `forward`."""

    def forward(  # type: ignore[override]
        self,
        input: Tensor,  # noqa: A002
        initial_state: Tensor,
        initial_cell: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns `logits`, `states`, `final_state`, `final_cell`."""
        states, (final_state, final_cell) = self.rnn((input - self.mean) / self.std, (initial_state, initial_cell))
        return self.fc(states), states, final_state, final_cell


def build_torchscript(model: RecurrentClassifier[Any]) -> bytes:
    """Serializes `model` as TorchScript, in eval mode and without gradients.

    Traced, since the output of torch.jit.script depends on Python's hash seed. Nothing is lost: the only control flow
    is in nn.RNN's checks of its arguments, and batch and time stay dynamic. Equal models give equal bytes in the first
    call of a process; later torch gives its types other names.
    """
    detached = copy.deepcopy(model).eval().requires_grad_(False)
    rnn = detached.rnn
    state = torch.zeros(rnn.num_layers, 2, rnn.hidden_size)
    example = (torch.zeros(2, 3, rnn.input_size), *[state] * len(state_names(model)))
    unrolled = UnrolledLSTM if isinstance(rnn, nn.LSTM) else Unrolled
    buffer = io.BytesIO()
    with quiet():
        warnings.simplefilter("ignore", TracerWarning)  # of those checks
        traced = torch.jit.trace(unrolled(detached), example, check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, buffer)
    return buffer.getvalue()
