"""A PyTorch module on whole sequences, in eager PyTorch: the reference that steps are proven against."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unroll_engine.models.spec import Float32Array
from unroll_export.steps.parts import Part, Parts, tensors_of
from unroll_export.steps.recurrent_steps import RECURRENT
from unroll_export.steps.sequence_graph import PREFIXES
from unroll_export.weight_files import ImportRefusedError

_LONGEST_EXAMPLE = 64
"""Timesteps of the example that the proof takes."""


class EagerModule:
    """A copy of a module, which eager PyTorch runs on whole sequences: the reference of the proof.

    Args:
        module: The module; used on the CPU in eval mode.
        example: An input, [batch, time, *shape] or [time, batch, *shape]: numbers such as it meets in use, or ids.

    Raises:
        ImportRefusedError: the module doesn't run on such inputs, or has no recurrent layers.

    Attributes:
        module: The copy.
        batch_first: True if inputs are [batch, time, *shape].
        shape: Dimensions of a timestep; empty for one number.
        steps: None: it takes any number of timesteps.
        time_axes: Place of the time in each output of one sequence, by name; None if it gives the last step's alone.
        step_axes: As `time_axes`, for outputs that have the time as a dimension of its own.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            raise ImportRefusedError("module: TorchScript; pass the nn.Module that it was made of")
        # torch.compile wraps the module that it was given.
        self.module: nn.Module = copy.deepcopy(getattr(module, "_orig_mod", module)).cpu().eval()
        if not isinstance(example, Tensor | np.ndarray):
            raise ImportRefusedError(
                f"example: a {type(example).__name__}, one tensor expected: a timestep has one vector of values, so "
                "let the module split them; lengths are known to servers, so give them a default"
            )
        example = torch.as_tensor(example).detach().cpu()
        if example.is_floating_point():
            kinds = [each.dtype for each in self.module.parameters() if each.is_floating_point()]
            example = example.to(kinds[0] if kinds else torch.float32)
        if example.ndim < 2 or not example.numel() or not example.isfinite().all():
            raise ImportRefusedError(
                "example: one tensor of finite values, [batch, time, features] or ids [batch, time], expected"
            )
        self.example = example
        self.shape = tuple(example.shape[2:])
        self.steps: int | None = None
        self._parts = Parts(self.module)
        self.batch_first = self._finds_batch_first()
        wide, short, long = (self._shapes(*sizes) for sizes in ((2, 5), (1, 4), (1, 7)))
        self.time_axes: dict[str, int | None] = {}
        self.step_axes: dict[str, int | None] = {}
        for name, dims in short.items():
            pairs = list(zip(dims, long[name], strict=True))
            axis = pairs.index((4, 7)) if (4, 7) in pairs else None
            self.time_axes[name] = axis
            self.step_axes[name] = axis if axis is not None and wide[name][axis] == 5 else None

    @property
    def length(self) -> int:
        """Timesteps of the proof's drawn sequence."""
        return PREFIXES

    def probes(self) -> Iterator[Float32Array]:
        """Yields the sequences of the proof, [time, *shape]: one is drawn, one begins the example."""
        yield self.draw(np.random.default_rng(4), PREFIXES)
        first = self.example.select(0 if self.batch_first else 1, 0)
        begin: Float32Array = first[:_LONGEST_EXAMPLE].float().numpy()
        yield begin

    def ends(self, values: Float32Array) -> dict[str, NDArray[Any]]:
        """The outputs after the last of some steps [time, *shape] of one sequence."""
        outputs = self._run(torch.from_numpy(values).unsqueeze(0 if self.batch_first else 1))
        ends = {}
        for name, value in outputs.items():
            axis = self.time_axes[name]
            ends[name] = (value if axis is None else value.select(axis, -1)).numpy()
        return ends

    def in_float64(self) -> "EagerModule":
        """Returns the module in float64, with the same sequences."""
        twin = copy.copy(self)
        twin.module = copy.deepcopy(self.module).double()
        twin._parts = Parts(twin.module)
        twin.example = self.example.double() if self.example.is_floating_point() else self.example
        return twin

    @property
    def functions(self) -> set[str]:
        """Names of torch's functions that its last run called outside recurrent layers."""
        return self._parts.functions

    def calls(self, values: Float32Array) -> dict[str, Part]:
        """The calls of its parts for steps [time, *shape] of one sequence, in the order of their ends."""
        self.ends(values)
        return self._parts.calls

    def draw(self, rng: np.random.Generator, *sizes: int) -> Float32Array:
        """Returns random values like the example's, [*sizes, *shape]; of ids, the example's own."""
        example = self.example.float().numpy()
        if not self.example.is_floating_point():
            ids = rng.choice(example.reshape(-1), (*sizes, *self.shape))
            return np.asarray(ids, np.float32)
        scale = example.std(axis=(0, 1))
        drawn = rng.standard_normal((*sizes, *self.shape)) * np.where(scale > 0, scale, 1) + example.mean(axis=(0, 1))
        return np.asarray(drawn, np.float32)

    def _run(self, inputs: Tensor) -> dict[str, Tensor]:
        with self._parts.watched("the module", inputs):
            return tensors_of(self.module(inputs.to(self.example.dtype)))

    def _shapes(self, batch: int, time: int) -> dict[str, torch.Size]:
        sizes = (batch, time) if self.batch_first else (time, batch)
        outputs = self._run(torch.from_numpy(self.draw(np.random.default_rng(0), *sizes)))
        return {name: value.shape for name, value in outputs.items()}

    def _finds_batch_first(self) -> bool:
        """Returns True if 2 in an input [2, 5, *shape] is the batch of the first recurrent layer."""
        self.batch_first = True
        self._run(torch.from_numpy(self.draw(np.random.default_rng(0), 2, 5)))
        recurrent = [part for part in self._parts.calls.values() if isinstance(part.module, RECURRENT)]
        if not recurrent:
            raise ImportRefusedError("module: no recurrent layer is run: nn.RNN, nn.LSTM, nn.GRU or one of their cells")
        first = recurrent[0]
        batch: int = first.inputs[0].shape[0 if getattr(first.module, "batch_first", True) else 1]
        return batch == 2
