"""Decides the meaning of each input and output of a step graph: value of a timestep, state tensor, or constant."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unroll_export.steps.pairing import find_pairs
from unroll_export.steps.reading import Dim, Source, Value
from unroll_export.weight_files import ImportRefusedError
from unroll_proto.step_model import INPUT_DTYPES, STATE_DTYPES, StepTensor

_BATCH_NAMES = ("batch", "batch_size", "batchsize", "b", "n", "bs", "unk__batch")
_TIME_NAMES = ("time", "seq", "seq_len", "sequence", "sequence_length", "seq_length", "t", "s", "l", "length", "frames")


@dataclass(frozen=True)
class Options:
    """Options of the caller about a file.

    Attributes:
        states: Output with the next value, by input.
        constants: Values of constant inputs.
        contexts: Number of values of the previous step that precede those of a step, by input.
        chunk: Values of a step along the open dimension of an input.
        per_sequence: Inputs that have one value for a whole sequence.
        initial: Values of state tensors before the first step; zeros for others.
        alone: True to run sequences one at a time.
        matmul: True to write convolutions and recurrent nodes as products of matrices.
    """

    states: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    contexts: Mapping[str, int] = field(default_factory=dict)
    chunk: int | None = None
    per_sequence: Sequence[str] = ()
    initial: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    alone: bool = False
    matmul: bool = False


@dataclass(frozen=True, slots=True)
class PlannedState:
    """A state tensor.

    Attributes:
        tensor: Input of the step graph with its value.
        next: Output with its next value; empty if it never changes.
        initial: Its value before the first step, without the batch; None for zeros.
        context_of: Input that it is the context of; empty for a state of the source.
    """

    tensor: StepTensor
    next: str
    initial: NDArray[Any] | None = None
    context_of: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """The meaning of the inputs and outputs of a source.

    Attributes:
        inputs: Values of one timestep.
        states: The state.
        outputs: Names of the outputs of one timestep.
        constants: Constant inputs.
        alone: True if sequences run one at a time.
    """

    inputs: tuple[StepTensor, ...]
    states: tuple[PlannedState, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, NDArray[Any]]
    alone: bool


def make_plan(source: Source, options: Options) -> Plan:
    """Plans the step graph of a source.

    Raises:
        ImportRefusedError: an input has no meaning, or an option names a missing input or output.
    """
    _check_names(source, options)
    constants = {
        value.name: constant_of(value, options.constants[value.name])
        for value in source.inputs
        if value.name in options.constants
    }
    given = [value for value in source.inputs if value.name not in constants]
    whole = [value for value in given if value.name in options.per_sequence]
    given = [value for value in given if value not in whole]
    pairs = find_pairs(given, source.outputs, options.states)
    taken = {pair.before.name for pair in pairs}
    inputs = [value for value in given if value.name not in taken]
    if not pairs:
        raise ImportRefusedError(
            f"{source.file}: no state: no output is named as the next value of an input; --state INPUT=OUTPUT says "
            "which is. A graph with a copy of every step, as torch's newer exporter writes nn.RNN, has none: "
            "unroll_export.export takes the module"
        )
    if not inputs:
        raise ImportRefusedError(
            f"{source.file}: no values of a step: by its name, each input has a next value "
            f"({', '.join(f'{pair.before.name}={pair.after.name}' for pair in pairs)}); --state INPUT=OUTPUT says "
            "which are the state"
        )
    states = []
    for name, tensor, after in (
        *((pair.before.name, _state(pair.before, options), pair.after.name) for pair in pairs),
        *((value.name, _state(value, options), "") for value in whole),
    ):
        states.append(PlannedState(tensor, after, _initial(tensor, options.initial.get(name))))
    steps = []
    for value in inputs:
        tensor = _input(value, options)
        steps.append(tensor)
        if width := options.contexts.get(value.name):
            context = tensor._replace(name=f"{value.name}_context", after=(*tensor.after[:-1], width))
            initial = _initial(context, options.initial.get(context.name))
            states.append(PlannedState(context, f"{context.name}_next", initial, value.name))
    nexts = {pair.after.name for pair in pairs}
    outputs = tuple(value.name for value in source.outputs if value.name not in nexts)
    if not outputs:
        raise ImportRefusedError(f"{source.file}: no outputs beside the state")
    return Plan(tuple(steps), tuple(states), outputs, constants, options.alone)


def _check_names(source: Source, options: Options) -> None:
    names = [value.name for value in source.inputs]
    contexts = [f"{name}_context" for name in options.contexts]
    for option, given, known in (
        ("--set", options.constants, names),
        ("--context", options.contexts, names),
        ("--per-sequence", options.per_sequence, names),
        ("--initial", options.initial, names + contexts),
    ):
        for name in given:
            if name not in known:
                raise ImportRefusedError(f"{option}: no input is named {name!r}; there are {', '.join(known)}")


def constant_of(value: Value, text: str) -> NDArray[Any]:
    """Reads the fixed value of an input.

    Raises:
        ImportRefusedError: the input takes other values.
    """
    dims = tuple(1 if isinstance(dim, str) else dim for dim in value.dims or ())
    try:
        numbers = np.array([float(each) for each in text.split(",")])
        array = numbers.astype(value.dtype)
    except ValueError:
        raise ImportRefusedError(f"--set {value.name}={text}: numbers expected, separated by commas") from None
    if (array != numbers).any() or array.size not in (1, int(np.prod(dims))):
        raise ImportRefusedError(f"--set {value.name}={text}: {value} takes other values")
    return np.full(dims, array[0]) if array.size == 1 else array.reshape(dims)


def _initial(tensor: StepTensor, given: NDArray[Any] | None) -> NDArray[Any] | None:
    if given is None:
        return None
    sizes = [size for size in given.shape if size != 1]
    if sizes != [size for size in tensor.dims if size != 1]:
        raise ImportRefusedError(f"--initial {tensor.name}: {list(given.shape)}, {list(tensor.dims)} expected")
    if not np.isfinite(given).all():
        raise ImportRefusedError(f"--initial {tensor.name}: has values that are not finite")
    array = given.astype(tensor.dtype)
    if (array != given).any() and tensor.dtype.kind in "iu":
        raise ImportRefusedError(f"--initial {tensor.name}: whole numbers expected")
    return array.reshape(tensor.dims)


def _state(value: Value, options: Options) -> StepTensor:
    if value.dtype.name not in STATE_DTYPES:
        raise ImportRefusedError(f"{value}: a state is one of {', '.join(STATE_DTYPES)}")
    dims = _known_rank(value)
    axis, dims = _batch_axis(value, dims, options.alone)
    still_open = [dim for dim in dims if isinstance(dim, str)]
    if still_open:
        raise ImportRefusedError(f"{value}: a state that can grow ({', '.join(still_open)} is open) can't be served")
    return _tensor(value, dims, axis)


def _input(value: Value, options: Options) -> StepTensor:
    if value.dtype.name not in INPUT_DTYPES:
        raise ImportRefusedError(f"{value}: an input is one of {', '.join(INPUT_DTYPES)}; --set {value.name}=VALUE")
    if value.dims == ():
        raise ImportRefusedError(f"{value}: one number for all sequences; --set {value.name}=VALUE")
    axis, dims = _batch_axis(value, _known_rank(value), options.alone)
    context = options.contexts.get(value.name, 0)
    sizes: list[Dim] = list(dims)
    for index, dim in enumerate(dims):
        if isinstance(dim, str):
            if options.chunk is not None:
                sizes[index] = options.chunk
            elif dim.lower() in _TIME_NAMES and len(dims) > 1:
                sizes[index] = 1
            else:
                raise ImportRefusedError(f"{value}: dimension {dim} is open; --chunk N says how many values a step has")
    if context and (not sizes or axis == len(sizes)):
        raise ImportRefusedError(f"--context {value.name}: {value} has no values beside the batch")
    if context and isinstance(whole := dims[-1], int):
        # The file's own size counts the context.
        sizes[-1] = whole - context
        if whole <= context or options.chunk not in (None, whole - context):
            raise ImportRefusedError(f"--context {value.name}:{context}: {value} has room for {whole - context} more")
    return _tensor(value, sizes, axis)


def _known_rank(value: Value) -> tuple[Dim, ...]:
    if value.dims is None:
        raise ImportRefusedError(f"{value}: the file doesn't tell its dimensions")
    return value.dims


def _batch_axis(value: Value, dims: tuple[Dim, ...], alone: bool) -> tuple[int | None, tuple[Dim, ...]]:
    """Returns the axis of the batch, None if sequences run alone, and the other dimensions; all of them if alone."""
    still_open = [index for index, dim in enumerate(dims) if isinstance(dim, str)]
    named = [index for index in still_open if str(dims[index]).lower() in _BATCH_NAMES]
    unnamed = [index for index in still_open if str(dims[index]).lower() not in _TIME_NAMES]
    chosen = named or unnamed
    if alone:
        return None, tuple(1 if [index] == chosen[:1] else dim for index, dim in enumerate(dims))
    if not chosen:
        raise ImportRefusedError(
            f"{value}: no dimension is open for several sequences; --alone runs them one at a time, without batches"
        )
    axis = chosen[0]
    return axis, dims[:axis] + dims[axis + 1 :]


def _tensor(value: Value, dims: Sequence[Dim], axis: int | None) -> StepTensor:
    sizes = tuple(int(dim) for dim in dims)
    place = 0 if axis is None else axis
    return StepTensor(value.name, value.dtype, sizes[:place], sizes[place:], axis is not None)
