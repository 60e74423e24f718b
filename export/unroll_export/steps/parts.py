"""The parts of a PyTorch module: what each took and gave in a run, and which of them a problem is in."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from unroll_export.steps.folding import one_line
from unroll_export.steps.recurrent_steps import RECURRENT, label_of
from unroll_export.steps.sequence_graph import PREFIX_BOUND
from unroll_export.weight_files import ImportRefusedError


class Part(NamedTuple):
    """The last call of a part of a module."""

    module: nn.Module
    inputs: tuple[Any, ...]
    output: Any


class Parts:
    """Calls of the parts of a module while it is watched.

    Attributes:
        calls: The last call of each part, in the order of their ends.
        functions: Names of torch's functions that the last run called outside recurrent layers.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.calls: dict[str, Part] = {}
        self.functions: set[str] = set()

    @contextmanager
    def watched(self, what: str, inputs: Tensor) -> Iterator[None]:
        """Notes the calls of a run without gradients; raises ImportRefusedError that names the part if it fails."""
        self.calls.clear()
        self.functions.clear()
        running: list[str] = []

        def note(function: str) -> None:
            if not (running and isinstance(self._module.get_submodule(running[-1]), RECURRENT)):
                self.functions.add(function)

        def enter(name: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            running.append(name)
            if any(isinstance(each, PackedSequence) for each in (*inputs, *named.values())):
                label = label_of(name, module)
                raise ImportRefusedError(f"{label}: takes packed sequences, a tensor expected: servers know lengths")

        def leave(name: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            running.pop()
            self.calls.pop(name, None)
            self.calls[name] = Part(module, (*inputs, *named.values()), output)

        hooks = []
        for name, part in self._module.named_modules():
            hooks.append(part.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
            hooks.append(part.register_forward_hook(partial(leave, name), with_kwargs=True))
        try:
            with torch.no_grad(), _Functions(note):
                yield
        except ImportRefusedError:
            raise
        except Exception as error:
            name = running[-1] if running else ""
            part = label_of(name, self._module.get_submodule(name))
            raise ImportRefusedError(
                f"{what} doesn't run on {list(inputs.shape)}: {part}: {one_line(error)}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()


class _Functions(TorchFunctionMode):
    """Notes calls of torch's functions, and refuses decisions by a tensor's value: no graph holds them.

    Args:
        note: Called with the name of each function.
    """

    _DECISIONS = (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.tolist)

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._DECISIONS:
            raise ValueError("decides by a tensor's value, which no graph can; torch.where chooses by values")
        self._note(func.__name__)
        return func(*args, **(kwargs or {}))


def tensors_of(outputs: Any, name: str = "output") -> dict[str, Tensor]:
    """Names the tensors of what a module returns: by keys, or `output`, `output_1`, ... by place."""
    if isinstance(outputs, Tensor):
        return {name: outputs}
    found: dict[str, Tensor] = {}
    if isinstance(outputs, Mapping):
        for key, value in outputs.items():
            found |= tensors_of(value, str(key))
    elif isinstance(outputs, tuple | list):
        for place, value in enumerate(outputs):
            found |= tensors_of(value, f"{name}_{place}" if place else name)
    elif outputs is not None:
        raise ImportRefusedError(f"module: returns a {type(outputs).__name__}; tensors expected")
    return found


def differ(whole: Any, step: Any) -> bool:
    """Compares the first tensors of what a part takes or gives: for a sequence, and for its last step."""
    whole, step = (next(iter(each), None) if isinstance(each, tuple | list) else each for each in (whole, step))
    if not isinstance(whole, Tensor) or not isinstance(step, Tensor):
        return False
    if whole.shape != step.shape:
        pairs = list(zip(whole.shape, step.shape, strict=False))
        changed = [axis for axis, (one, other) in enumerate(pairs) if one != other]
        if whole.ndim != step.ndim or len(changed) > 1 or step.shape[changed[0]] != 1:
            return False
        whole = whole.narrow(changed[0], whole.shape[changed[0]] - 1, 1)
    whole, step = whole.double(), step.double()
    return not bool(((whole - step).abs() <= PREFIX_BOUND * whole.abs().clamp(min=1)).all())
