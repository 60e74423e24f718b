"""Inputs and outputs of a model, as the Open Inference Protocol describes them."""

from typing import Any, NamedTuple

import numpy as np

from unroll_engine.models.spec import ModelSpec, StateTensor

DATATYPES: dict[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
}
"""Number formats by the protocol's names."""
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
_INTEGERS = ("INT32", "INT64", "UINT32", "UINT64")
OPEN = -1
"""Size of a dimension that a request chooses."""


class Described(NamedTuple):
    """An input or output.

    Attributes:
        name: Its name.
        datatypes: Data types that are accepted, the preferred one first; an output has one.
        shape: Sizes; `OPEN` for the batch and the timesteps.
        optional: True if a request can omit it.
    """

    name: str
    datatypes: tuple[str, ...]
    shape: tuple[int, ...]
    optional: bool = False


def datatype_of(dtype: np.dtype[Any]) -> str:
    """Returns the protocol's name of a number format."""
    return _NAMES[dtype.newbyteorder("<")]


def inputs_of(spec: ModelSpec) -> tuple[Described, ...]:
    """Returns the inputs of a model; the first ones are the values of its timesteps."""
    return (
        *(
            Described(name, ("FP32", *(_INTEGERS if dtype.kind in "iu" else ())), (OPEN, OPEN, *shape))
            for name, shape, dtype in spec.inputs
        ),
        Described("lengths", _INTEGERS, (OPEN,), optional=True),
        *(_state("initial", tensor) for tensor in spec.states),
    )


def outputs_of(spec: ModelSpec) -> tuple[Described, ...]:
    """Returns the outputs of a model: of every timestep of a step model, else of a sequence."""
    finals = (_state("final", tensor)._replace(optional=False) for tensor in spec.states)
    if spec.whole:
        return tuple(Described(name, ("FP32",), (OPEN, *shape)) for name, shape, _ in spec.outputs)
    if spec.step:
        return (*(Described(name, ("FP32",), (OPEN, OPEN, *shape)) for name, shape, _ in spec.outputs), *finals)
    return (
        Described("logits", ("FP32",), (OPEN, spec.output_size)),
        Described("probabilities", ("FP32",), (OPEN, max(spec.output_size, 2))),
        Described("states", ("FP32",), (OPEN, OPEN, spec.hidden_size)),
        *finals,
    )


def default_outputs(spec: ModelSpec) -> tuple[str, ...]:
    """Returns the outputs of a request that names none."""
    return tuple(name for name, *_ in spec.outputs) if spec.step else ("logits", "probabilities")


def _state(prefix: str, tensor: StateTensor) -> Described:
    return Described(f"{prefix}_{tensor.name}", (datatype_of(tensor.dtype),), (OPEN, *tensor.shape), optional=True)
