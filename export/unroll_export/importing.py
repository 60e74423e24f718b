"""Import of networks trained elsewhere with PyTorch, by the names and shapes of their tensors."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unroll_export.bidirectional import READOUTS, BidirectionalClassifier, Readout
from unroll_export.model import Cell, Nonlinearity, RecurrentClassifier, build
from unroll_export.runs import TrainedRun
from unroll_export.weight_files import ImportRefusedError, Samples

RECURRENT = re.compile(
    r"(?P<prefix>.*?)(?P<kind>weight_ih|weight_hh|bias_ih|bias_hh|weight_hr)_l(?P<layer>\d+)(_reverse)?"
)
GATES: dict[int, Cell] = {1: "rnn", 3: "gru", 4: "lstm"}
"""Cell by the number of gates: rows of weight_hh for each unit."""
BY_MODULE = "tensors don't show such a network; unroll_export.export takes the module itself"
_Model = TypeVar("_Model", RecurrentClassifier[Any], BidirectionalClassifier)
NEAR = 1e-4
"""Difference from a sample's output around 1 that rounding can explain."""


def import_weights(
    weights: Mapping[str, Tensor],
    *,
    cell: Cell | None = None,
    nonlinearity: Nonlinearity | None = None,
    renamed: Mapping[str, str] | None = None,
    mean: NDArray[np.float32] | None = None,
    std: NDArray[np.float32] | None = None,
    samples: Samples | None = None,
) -> RecurrentClassifier[Any]:
    """Builds the classifier whose tensors are in `weights`: one stack of recurrent layers and one linear readout.

    Args:
        weights: Tensors by name, as torch names those of nn.RNN, nn.LSTM, nn.GRU and nn.Linear.
        cell: The cell, if the number of gates should be checked.
        nonlinearity: Nonlinearity of an Elman network; required without samples, since the tensors don't show it.
        renamed: New prefix by old one; the readout's is `fc`.
        mean: Value to subtract from each feature, [features]; None for 0.
        std: Divisor of each feature, [features]; None for 1.
        samples: Inputs and outputs of the original network, which the classifier must reproduce.

    Raises:
        ImportRefusedError: the tensors are of another network, or it does not reproduce the samples.
    """
    layers, rest = _recurrent(_rename(weights, renamed or {}))
    if any(name.endswith("_reverse") for name in layers):
        raise ImportRefusedError("bidirectional: import_bidirectional takes it, for whole sequences")
    found = _cell_of(layers, cell)
    count, inputs, hidden = _sizes(layers)
    readout, rest = _readout(rest, hidden)
    outputs = readout[0].shape[0]
    choices = _nonlinearities(found, nonlinearity, samples)
    models = [build(found, inputs, hidden, outputs, count, nonlinearity=each) for each in choices]
    for model in models:
        _fill(model, layers, readout, rest, mean, std)
    return _best(models, samples)


def is_bidirectional(weights: Mapping[str, Tensor]) -> bool:
    """Returns True if weights are of recurrent layers of both directions."""
    return any(RECURRENT.fullmatch(name) and name.endswith("_reverse") for name in weights)


def import_bidirectional(
    weights: Mapping[str, Tensor],
    *,
    cell: Cell | None = None,
    nonlinearity: Nonlinearity | None = None,
    readout: Readout | None = None,
    renamed: Mapping[str, str] | None = None,
    mean: NDArray[np.float32] | None = None,
    std: NDArray[np.float32] | None = None,
    samples: Samples | None = None,
) -> BidirectionalClassifier:
    """Builds the classifier of whole sequences whose tensors are in `weights`; see `import_weights`.

    Args:
        weights: See import_weights.
        cell: See import_weights.
        nonlinearity: See import_weights.
        readout: Part of the states that the readout takes; required without samples, since the tensors don't show it.
        renamed: See import_weights.
        mean: See import_weights.
        std: See import_weights.
        samples: See import_weights; outputs of whole sequences.

    Raises:
        ImportRefusedError: the tensors are of another network, or it does not reproduce the samples.
    """
    layers, rest = _recurrent(_rename(weights, renamed or {}))
    found = _cell_of(layers, cell)
    count, inputs, hidden = _sizes(layers)
    if readout is None and samples is None:
        raise ImportRefusedError(
            f"--readout: required for a bidirectional network, one of {', '.join(READOUTS)}: what of its states goes "
            "into the readout, which its tensors don't show; or give --samples with outputs that it computed"
        )
    matrices, rest = _readout(rest, 2 * hidden)
    outputs = matrices[0].shape[0]
    models = [
        BidirectionalClassifier(build(found, inputs, hidden, outputs, count, nonlinearity=each).rnn, outputs, what)
        for each in _nonlinearities(found, nonlinearity, samples)
        for what in ([readout] if readout else READOUTS)
    ]
    for model in models:
        _fill(model, layers, matrices, rest, mean, std)
    return _best(models, samples)


def _nonlinearities(cell: Cell, given: Nonlinearity | None, samples: Samples | None) -> list[Nonlinearity]:
    """Returns the nonlinearities that a network can have."""
    if cell == "rnn" and given is None and samples is None:
        raise ImportRefusedError(
            "--nonlinearity: required for an Elman network, whose tensors are the same with tanh and relu; or give "
            "--samples with outputs that it computed"
        )
    return [given] if given else ["tanh", "relu"] if cell == "rnn" else ["tanh"]


def _best(models: Sequence[_Model], samples: Samples | None) -> _Model:
    """Returns the model that reproduces the samples; the first one without samples."""
    if samples is None:
        return models[0]
    differences = [_difference(model, samples) for model in models]
    best = min(range(len(models)), key=differences.__getitem__)
    if not differences[best] <= NEAR:
        raise ImportRefusedError(
            f"--samples: the network gives other outputs (off by {differences[best]:.2g}): another nonlinearity, "
            "standardization (--mean, --std), or layers that its tensors don't show"
        )
    return models[best]


def imported_run(model: RecurrentClassifier[Any], source: str, sha256: str, labels: Sequence[str] = ()) -> TrainedRun:
    """Describes an imported model as a finished run, which `export_run` takes.

    Args:
        model: The model.
        source: Name of the file or the module that its weights came from.
        sha256: SHA-256 of that, hexadecimal.
        labels: Class names by index; their indices if absent.

    Raises:
        ImportRefusedError: the number of labels doesn't fit the outputs.
    """
    outputs = model.fc.out_features
    names = class_names(labels, outputs)
    summary = {
        "data": source,
        "data_sha256": sha256,
        "seed": 0,
        "epochs": 0,
        "training_sequences": 0,
        "longest_sequence": 0,
    }
    features = tuple(f"feature_{index + 1}" for index in range(model.rnn.input_size))
    return TrainedRun(model.eval(), names, features, summary)


def class_names(labels: Sequence[str], outputs: int) -> tuple[str, ...]:
    """Returns the names of the classes of a readout; their indices if no labels are given.

    Raises:
        ImportRefusedError: the number of labels doesn't fit the outputs.
    """
    classes = max(2, outputs)
    names = tuple(labels) or tuple(str(index) for index in range(classes))
    if len(names) != classes or len(set(names)) != classes:
        raise ImportRefusedError(
            f"--labels: {len(names)} names, {len(set(names))} of them different; {classes} are needed for {outputs} "
            "outputs, one per line"
        )
    return names


def _rename(weights: Mapping[str, Tensor], renamed: Mapping[str, str]) -> dict[str, Tensor]:
    for old in renamed:
        if not any(name == old or name.startswith(f"{old}.") for name in weights):
            raise ImportRefusedError(f"--map: no tensor is named {old}.*; there are {_listed(weights)}")
    named = {}
    for name, tensor in weights.items():
        prefix = next((old for old in renamed if name.startswith(f"{old}.")), None)
        new = name if prefix is None else renamed[prefix] + name[len(prefix) :]
        if not tensor.is_floating_point():
            # Counters, such as num_batches_tracked.
            continue
        if not tensor.isfinite().all():
            raise ImportRefusedError(f"{name}: holds values that are not finite")
        named[new] = tensor.detach().float()
    return named


def _recurrent(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits the tensors into those of the recurrent layers, without their prefix, and the others."""
    stacks: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for name, tensor in named.items():
        match = RECURRENT.fullmatch(name)
        if match is None:
            rest[name] = tensor
            continue
        if match["kind"] == "weight_hr":
            raise ImportRefusedError(f"{name}: an LSTM with projections (proj_size): {BY_MODULE}")
        stacks.setdefault(match["prefix"], {})[name[len(match["prefix"]) :]] = tensor
    if not stacks:
        raise ImportRefusedError(f"no recurrent layer: NAME.weight_ih_l0 is expected, there are {_listed(named)}")
    if len(stacks) > 1:
        raise ImportRefusedError(
            f"{len(stacks)} recurrent modules ({', '.join(prefix.rstrip('.') or 'unnamed' for prefix in stacks)}): "
            f"{BY_MODULE}"
        )
    return next(iter(stacks.values())), rest


def _cell_of(layers: Mapping[str, Tensor], cell: Cell | None) -> Cell:
    for name in ("weight_ih_l0", "weight_hh_l0"):
        if name not in layers or layers[name].ndim != 2:
            raise ImportRefusedError(f"{name}: a matrix is expected, there are {_listed(layers)}")
    rows, hidden = layers["weight_hh_l0"].shape
    found = GATES.get(rows // hidden) if rows % hidden == 0 else None
    if found is None:
        raise ImportRefusedError(f"weight_hh_l0: {rows} x {hidden} fits no RNN (1), GRU (3) or LSTM (4 rows a unit)")
    if cell is not None and cell != found:
        raise ImportRefusedError(f"--cell {cell}: weight_hh_l0 is {rows} x {hidden}, which is {found.upper()}'s shape")
    return found


def _sizes(layers: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """Returns the number of layers, the features and the hidden size."""
    count = 1 + max(int(name.removesuffix("_reverse").rpartition("_l")[2]) for name in layers)
    return count, layers["weight_ih_l0"].shape[1], layers["weight_hh_l0"].shape[1]


def _readout(rest: Mapping[str, Tensor], hidden_size: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Splits off the weight of the linear readout, [outputs, hidden_size], and its bias if it has one."""
    candidates = [name for name, each in rest.items() if name.endswith("weight") and each.ndim == 2]
    fitting = [name for name in candidates if rest[name].shape[1] == hidden_size]
    chosen = "fc.weight" if "fc.weight" in fitting else fitting[0] if len(fitting) == 1 else None
    if chosen is None:
        raise ImportRefusedError(
            f"no readout: one matrix [outputs, {hidden_size}] is expected beside the recurrent layers, found "
            f"{', '.join(fitting) or _listed(rest)}; --map NAME=fc says which"
        )
    bias = chosen.removesuffix("weight") + "bias"
    found = {name: rest[name] for name in (chosen, bias) if name in rest}
    return list(found.values()), {name: tensor for name, tensor in rest.items() if name not in found}


def _fill(
    model: RecurrentClassifier[Any] | BidirectionalClassifier,
    layers: Mapping[str, Tensor],
    readout: Sequence[Tensor],
    rest: Mapping[str, Tensor],
    mean: NDArray[np.float32] | None,
    std: NDArray[np.float32] | None,
) -> None:
    """Loads the tensors into a model, which is set to eval mode."""
    values: dict[str, Tensor] = {f"rnn.{name}": tensor for name, tensor in layers.items()}
    values |= dict(zip(("fc.weight", "fc.bias"), readout, strict=False))
    for name, given in (("mean", mean), ("std", std)):
        tensor = rest.get(name) if given is None else torch.from_numpy(np.asarray(given, np.float32))
        if tensor is not None:
            values[name] = tensor.reshape(-1)
    unknown = rest.keys() - {"mean", "std"}
    if unknown:
        raise ImportRefusedError(
            f"not part of recurrent layers and a linear readout: {_listed(sorted(unknown))}: {BY_MODULE}"
        )
    state = model.state_dict()
    for name, expected in state.items():
        value = values.pop(name, None)
        if value is None:
            if "weight" in name:
                raise ImportRefusedError(f"{name.removeprefix('rnn.')}: missing")
            # Without a bias, or without standardization.
            value = torch.ones_like(expected) if name == "std" else torch.zeros_like(expected)
        if value.shape != expected.shape:
            raise ImportRefusedError(
                f"{name.removeprefix('rnn.')}: {list(value.shape)}, {list(expected.shape)} expected"
            )
        state[name] = value
    if not (state["std"] > 0).all():
        raise ImportRefusedError("--std: positive values expected")
    model.load_state_dict(state)
    model.eval()


@torch.no_grad()
def _difference(model: RecurrentClassifier[Any] | BidirectionalClassifier, samples: Samples) -> float:
    """Computes the largest difference from the samples, relative to outputs above 1."""
    if samples.inputs.shape[2] != model.rnn.input_size:
        raise ImportRefusedError(
            f"--samples: inputs have {samples.inputs.shape[2]} features, the network has {model.rnn.input_size}"
        )
    if isinstance(model, BidirectionalClassifier) or samples.outputs.ndim == 2:
        logits = model(samples.inputs).double()
    else:
        logits = model.unroll(samples.inputs)[0].double()
    if logits.shape != samples.outputs.shape:
        raise ImportRefusedError(
            f"--samples: outputs are {list(samples.outputs.shape)}, the network's are {list(logits.shape)}"
        )
    probabilities = logits.sigmoid() if logits.shape[-1] == 1 else logits.softmax(-1)
    scale = samples.outputs.abs().clamp(min=1)
    given = (logits, probabilities, probabilities.log())
    return min(float(((each - samples.outputs).abs() / scale).max()) for each in given)


def _listed(names: Any) -> str:
    names = list(names)
    return (", ".join(names[:6]) + (", ..." if len(names) > 6 else "")) or "none"
