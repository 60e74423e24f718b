"""The step of a PyTorch module: its export as ONNX, and the part that has no steps."""

import inspect
import io
import warnings
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unroll_engine.models.spec import Float32Array
from unroll_export.steps.eager_module import EagerModule
from unroll_export.steps.folding import one_line
from unroll_export.steps.open_batch import open_batch
from unroll_export.steps.parts import Parts, differ, tensors_of
from unroll_export.steps.reading import source_of
from unroll_export.steps.recurrent_steps import RECURRENT, label_of, of_one_step
from unroll_export.steps.sequences import Stepped
from unroll_export.weight_files import ImportRefusedError

OPSET = 17
"""The first operator set with LayerNormalization."""
_BATCHES = (2, 3)
"""Sequences of the examples of the export."""


class StepModule(nn.Module):
    """The step of a module: values [batch, *shape] and states to outputs of the step and next states.

    Args:
        original: The module on whole sequences.
    """

    def __init__(self, original: EagerModule) -> None:
        super().__init__()
        self.inner, self.tape = of_one_step(original.module)
        self._parts = Parts(self.inner)
        self._original = original
        self._time_axis = 1 if original.batch_first else 0
        self._initial()

    def forward(self, values: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Computes a step; without states the first of a sequence."""
        self.tape.begin(states)
        outputs = tensors_of(self.inner(values.unsqueeze(self._time_axis)))
        axes = self._original.step_axes
        ends = []
        for name, value in outputs.items():
            axis = axes[name]
            ends.append(value if axis is None else value.select(axis, 0))
        return (*ends, *self.tape.after)

    def stepped(self) -> Stepped:
        """Exports the step as ONNX.

        Raises:
            ImportRefusedError: torch can't export a part. The message names it.
        """
        names = [f"{name}_next" for name in self.states]
        outputs = list(self._original.time_axes)
        values = next(iter(inspect.signature(self.inner.forward).parameters), "input")
        while values in (*outputs, *names, *self.states):
            values += "_"
        try:
            one, other = (
                onnx.load_from_string(_export(self, self._example(size), [values, *self.states], [*outputs, *names]))
                for size in _BATCHES
            )
        except Exception as error:
            raise ImportRefusedError(f"torch can't export {self._unexportable()}: {one_line(error)}") from error
        open_batch(one, other, _BATCHES, values)
        source = source_of(type(self._original.module).__name__, one.SerializeToString(deterministic=True))
        return Stepped(source, self.initial, tuple(self.states), self._original)

    def first_difference(self, values: Float32Array) -> str:
        """Finds the first part whose values differ if a sequence is computed step by step; empty if there is none.

        Args:
            values: The sequence, [time, *shape].

        Returns:
            "what 'pool' (Pooling) gives", or takes if it is given other values by code around it.
        """
        for end in range(1, len(values) + 1):
            whole = self._original.calls(values[:end])
            states: tuple[Tensor, ...] = ()
            for row in values[:end]:
                self._first_or_next(torch.from_numpy(row).unsqueeze(0), states)
                states = tuple(self.tape.after)
            for name, part in whole.items():
                if name and (step := self._parts.calls.get(name)):
                    label = label_of(name, part.module)
                    if differ(part.inputs, step.inputs):
                        return f"what {label} takes"
                    if differ(part.output, step.output):
                        return f"what {label} gives"
        return ""

    def _first_or_next(self, values: Tensor, states: tuple[Tensor, ...] = ()) -> None:
        with self._parts.watched("one step of the module", values):
            self(values.to(self._dtype), *states)

    def _unexportable(self) -> str:
        """The first part that torch can't export by itself."""
        self._first_or_next(self._example(2)[0])
        for name, part in self._parts.calls.items():
            if not any(isinstance(each, RECURRENT) for each in part.module.modules()):
                try:
                    _export(part.module, part.inputs, None, None)
                except Exception:
                    return label_of(name, part.module)
        return "its forward"

    @property
    def _dtype(self) -> torch.dtype:
        given = self._original.example.dtype
        return torch.float32 if given.is_floating_point else given

    def _example(self, size: int) -> tuple[Tensor, ...]:
        values = torch.from_numpy(self._original.draw(np.random.default_rng(0), size))
        return (values.to(self._dtype), *(torch.zeros(size, *initial.shape[1:]) for initial in self.tape.initial))

    def _initial(self) -> None:
        """Finds the states and what begins them, by the first step of two batches of other values."""
        begins = []
        for seed in (5, 6):
            self._first_or_next(torch.from_numpy(self._original.draw(np.random.default_rng(seed), 2)))
            begins.append([each.detach() for each in self.tape.initial])
        taken = self.tape.names
        self.states = [f"{name}{taken[:place].count(name) or ''}" for place, name in enumerate(taken)]
        self.initial: dict[str, NDArray[Any]] = {}
        for name, one, other in zip(self.states, *begins, strict=True):
            if one.shape != other.shape or (one != other).any() or (one != one[:1]).any():
                raise ImportRefusedError(f"state {name!r}: begins with what depends on the values of the sequence")
            if one.any():
                self.initial[name] = one[0].numpy()


def _export(module: nn.Module, inputs: tuple[Any, ...], names: list[str] | None, outputs: list[str] | None) -> bytes:
    """Exports by tracing, with an open first dimension of named inputs: the exporter that needs no other package."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            inputs,
            file,  # type: ignore[arg-type]  # paths alone are declared, for the other exporter
            dynamo=False,
            input_names=names,
            output_names=outputs,
            dynamic_axes={name: {0: "batch"} for name in names or ()},
            opset_version=OPSET,
        )
    return file.getvalue()
