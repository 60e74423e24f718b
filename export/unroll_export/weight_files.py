"""Files of networks trained elsewhere: weights, and samples of inputs and outputs."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

NESTED = ("state_dict", "model_state_dict", "model")
"""Keys under which checkpoints hold a state dict."""


class ImportRefusedError(ValueError):
    """A network can't be imported; the message is one line with the tensor or file at fault and a remedy."""


class Samples(NamedTuple):
    """Inputs, and the outputs of the original network.

    Attributes:
        inputs: float32 [sequences, time, features].
        outputs: float [sequences, outputs] of the last step, or [sequences, time, outputs]: logits, or probabilities.
    """

    inputs: Tensor
    outputs: Tensor


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file, or of a state dict or checkpoint saved by torch.save.

    Raises:
        ImportRefusedError: the file holds code, or no tensors by name.
        OSError: the file can't be read.
    """
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ImportRefusedError(
            f"{path}: holds code, not only tensors: save its state_dict, or pass the module to unroll_export.export"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImportRefusedError(f"{path}: not readable as weights: {reason}") from None
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ImportRefusedError(f"{path}: holds a {type(content).__name__}, not tensors by name: save its state_dict")
    weights = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    if not weights:
        raise ImportRefusedError(f"{path}: holds no tensors by name: save its state_dict")
    return weights


def read_samples(path: Path) -> Samples:
    """Reads an npz file with the arrays `inputs` and `outputs`.

    Raises:
        ImportRefusedError: an array is missing or has another shape.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
    except (ValueError, OSError) as error:
        raise ImportRefusedError(f"{path}: not readable as npz: {error}") from None
    if not {"inputs", "outputs"} <= arrays.keys():
        raise ImportRefusedError(
            f"{path}: arrays `inputs` and `outputs` expected, it has {', '.join(arrays) or 'none'}"
        )
    inputs, outputs = arrays["inputs"], arrays["outputs"]
    if inputs.ndim != 3 or outputs.ndim not in (2, 3) or len(inputs) != len(outputs) or not inputs.size:
        raise ImportRefusedError(
            f"{path}: inputs [sequences, time, features] and outputs [sequences, outputs] or "
            f"[sequences, time, outputs] expected, got {list(inputs.shape)} and {list(outputs.shape)}"
        )
    return Samples(torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(outputs.astype(np.float64)))
