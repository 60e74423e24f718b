"""One timestep of PyTorch's recurrent modules: products with constant weights, and states that the caller holds."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unroll_export.weight_files import ImportRefusedError

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
"""nn.RNN, nn.LSTM, nn.GRU and their cells."""


class Tape:
    """States of one timestep, in the order in which a module's recurrent layers take them.

    Attributes:
        names: Names of the states that the last timestep took.
        initial: The values that the module itself began them with, [batch, size] each.
        after: Their next values, [batch, size] each.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.initial: list[Tensor] = []
        self.after: list[Tensor] = []
        self._before: Sequence[Tensor] = ()

    def begin(self, before: Sequence[Tensor]) -> None:
        """Begins a timestep with its states; empty for the first step of a sequence."""
        self.names, self.initial, self.after, self._before = [], [], [], before

    def take(self, name: str, initial: Tensor) -> Tensor:
        """Returns the next state, which begins a sequence as `initial`."""
        value = self._before[len(self.names)] if self._before else initial
        self.names.append(name)
        self.initial.append(initial)
        return value


class _Cell:
    """The step of one layer; weights as torch names them, for example `weight_ih_l0`.

    Args:
        name: Name of its states.
        layer: The module with the weights.
        suffix: End of their names: "_l0", or empty.
        mode: One of RNN_TANH, RNN_RELU, LSTM, GRU.
        tape: Holds its states.
    """

    def __init__(self, name: str, layer: nn.Module, suffix: str, mode: str, tape: Tape) -> None:
        self._name, self._mode, self._tape = name, mode, tape

        def weights(kind: str) -> Tensor | None:
            found = getattr(layer, f"{kind}{suffix}", None)
            return None if found is None else found.detach().t().contiguous()

        self._bias_ih, self._bias_hh = weights("bias_ih"), weights("bias_hh")
        self._projection = weights("weight_hr")
        of_input, of_state = weights("weight_ih"), weights("weight_hh")
        assert of_input is not None
        assert of_state is not None
        self._of_input, self._of_state = of_input, of_state
        gates = {"LSTM": 4, "GRU": 3}.get(mode, 1)
        self._hidden = of_state.shape[1] // gates
        self._sizes = (of_state.shape[0], self._hidden) if mode == "LSTM" else (self._hidden,)

    def step(self, x: Tensor, given: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        """Computes a timestep.

        Args:
            x: [batch, features].
            given: The states that the module begins the layer with, [batch, size] each; None for zeros.

        Returns:
            The next states, [batch, size] each: h, and of an LSTM c.
        """
        initial = given or [x.new_zeros(x.shape[0], size) for size in self._sizes]
        h, *c = [self._tape.take(f"{self._name}_{kind}", each) for kind, each in zip("hc", initial, strict=False)]
        drive = _plus(x @ self._of_input, self._bias_ih)
        recurrent = _plus(h @ self._of_state, self._bias_hh)
        after: tuple[Tensor, ...]
        if self._mode == "GRU":
            of_x, of_h = (torch.split(each, self._hidden, 1) for each in (drive, recurrent))
            r, z = ((of_x[gate] + of_h[gate]).sigmoid() for gate in (0, 1))
            new = (of_x[2] + r * of_h[2]).tanh()
            after = (new + z * (h - new),)
        elif self._mode == "LSTM":
            i, f, g, o = torch.split(drive + recurrent, self._hidden, 1)
            kept = f.sigmoid() * c[0] + i.sigmoid() * g.tanh()
            h = o.sigmoid() * kept.tanh()
            after = (h if self._projection is None else h @ self._projection, kept)
        else:
            total = drive + recurrent
            after = (total.relu() if self._mode == "RNN_RELU" else total.tanh(),)
        self._tape.after += after
        return after


class _LayersStep:
    """Replaces `forward` of an nn.RNN, nn.LSTM or nn.GRU by that of one timestep.

    Args:
        label: Name for messages.
        name: Name of its states.
        module: The module.
        tape: Holds the states.
    """

    def __init__(self, label: str, name: str, module: nn.RNNBase, tape: Tape) -> None:
        self._label, self._time_axis = label, 1 if module.batch_first else 0
        several = module.num_layers > 1
        self._cells = [
            _Cell(f"{name}_l{layer}" if several else name, module, f"_l{layer}", module.mode, tape)
            for layer in range(module.num_layers)
        ]

    def __call__(self, input: Tensor, hx: Any = None) -> Any:  # noqa: A002 - torch's name
        if input.ndim != 3:
            raise ImportRefusedError(f"{self._label}: takes {list(input.shape)}, a sequence without a batch")
        if input.shape[self._time_axis] != 1:
            shape = f"{list(input.shape)} for one step of {input.shape[1 - self._time_axis]} sequences"
            raise ImportRefusedError(f"{self._label}: takes {shape}: time is not its dimension {self._time_axis}")
        given = None if hx is None else (hx if isinstance(hx, tuple) else (hx,))
        value, ends = input.select(self._time_axis, 0), []
        for index, cell in enumerate(self._cells):
            states = cell.step(value, None if given is None else [each[index] for each in given])
            value = states[0]
            ends.append(states)
        h, *c = ([layer[kind] for layer in ends] for kind in range(len(ends[0])))
        final = torch.stack(h) if not c else (torch.stack(h), torch.stack(c[0]))
        return value.unsqueeze(self._time_axis), final


class _CellStep:
    """Replaces `forward` of an nn.RNNCell, nn.LSTMCell or nn.GRUCell; see _LayersStep."""

    def __init__(self, label: str, name: str, module: nn.RNNCellBase, tape: Tape) -> None:
        mode = "LSTM" if isinstance(module, nn.LSTMCell) else "GRU" if isinstance(module, nn.GRUCell) else ""
        self._label = label
        self._cell = _Cell(name, module, "", mode or f"RNN_{module.nonlinearity}".upper(), tape)

    def __call__(self, input: Tensor, hx: Any = None) -> Any:  # noqa: A002 - torch's name
        if input.ndim != 2:
            raise ImportRefusedError(f"{self._label}: takes {list(input.shape)}, a sequence without a batch")
        given = None if hx is None else (hx if isinstance(hx, tuple) else (hx,))
        states = self._cell.step(input, given)
        return states if len(states) > 1 else states[0]


def of_one_step(module: nn.Module) -> tuple[nn.Module, Tape]:
    """Copies a module with the recurrent layers computing one timestep, from states on a tape.

    Args:
        module: The module; in eval mode.

    Raises:
        ImportRefusedError: a recurrent layer is bidirectional.
    """
    stepped, tape = copy.deepcopy(module).float(), Tape()
    found = [(name, each) for name, each in stepped.named_modules() if isinstance(each, RECURRENT)]
    for name, each in found:
        label = label_of(name, each)
        states = name.replace(".", "_") or type(each).__name__.lower()
        if isinstance(each, nn.RNNBase):
            if each.bidirectional:
                raise ImportRefusedError(
                    f"{label}: bidirectional: its backward direction begins at the end of a sequence, so that no step "
                    "can be answered before it; whole=True serves whole sequences"
                )
            each.forward = _LayersStep(label, states, each, tape)
        else:
            each.forward = _CellStep(label, states, each, tape)
    return stepped, tape


def label_of(name: str, module: nn.Module) -> str:
    """Returns a module's name and class for messages."""
    return f"{name or 'module'!r} ({type(module).__name__})"


def _plus(value: Tensor, bias: Tensor | None) -> Tensor:
    return value if bias is None else value + bias
