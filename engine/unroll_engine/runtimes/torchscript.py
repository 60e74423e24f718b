"""TorchScript on the CPU. Needs torch, the extra `unroll-engine[torchscript]`.

Deprecated upstream since torch 2.11. TorchScript can run code, so it is loaded only from a bundle whose checksums hold.
"""

import io
import math
import threading
import warnings
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from unroll_engine.models.spec import Float32Array, ModelSpec, State
from unroll_engine.runtimes.base import ArrayResult, TickResult
from unroll_proto import bundle

_GROWTH = 2**20
_MOST_TENSORS = 3
"""Inputs of a network: values, and up to two state tensors."""
_LAYER_GROWTH = 2**14
"""Bytes that the archive may grow by when it is unpacked, and for each layer: the exporter compresses code only."""


def check_archive(content: bytes, spec: ModelSpec) -> None:
    """Raises BundleError if `content` is not a zip archive, or unpacks to much more than its size."""
    limit = len(content) + _GROWTH + _LAYER_GROWTH * spec.num_layers
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise bundle.BundleError(f"{bundle.TORCHSCRIPT}: not a zip archive: {error}") from None
    if unpacked > limit:
        raise bundle.BundleError(f"{bundle.TORCHSCRIPT}: unpacks to {unpacked} bytes, {limit} at most")


def load_module(model: bytes, device: str) -> Any:
    """Loads the content of `model.ts` to a device."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.* is deprecated", category=DeprecationWarning)
        module = torch.jit.load(io.BytesIO(model), map_location=device)  # type: ignore[no-untyped-call]
    return module.eval()


class TorchScriptRuntime:
    """Runs `model.ts`, within the tolerance of eager PyTorch, not to the bit.

    Args:
        model: Content of `model.ts`.
    """

    name = "torchscript"
    device = "cpu"
    artifact = bundle.TORCHSCRIPT
    bitwise = False
    variant = ""

    def __init__(self, model: bytes) -> None:
        self._module = load_module(model, self.device)
        self._inputs = HostBuffers(pinned=False)

    def run(self, x: Float32Array, state: State) -> ArrayResult:
        """See Runtime.run."""
        with torch.inference_mode():
            values, *tensors = self._inputs.filled(x, *state)
            logits, states, *final = self._module(values.transpose(0, 1), *tensors)
        steps = logits.transpose(0, 1).numpy(), states.transpose(0, 1).numpy()
        return TickResult(*steps, tuple([each.numpy() for each in final]))


class HostBuffers(threading.local):
    """Host memory for the inputs of a network, reused by all runs of a thread, which grows to the largest.

    Args:
        pinned: True to lock its pages, so that a device copies from it directly.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._memory = [torch.empty(0) for _ in range(_MOST_TENSORS)]

    def filled(self, *inputs: Float32Array) -> list[torch.Tensor]:
        """Returns C-contiguous copies of inputs: torch needs writable memory, and a request's is not."""
        tensors = [self._of(index, values.shape) for index, values in enumerate(inputs)]
        for tensor, values in zip(tensors, inputs, strict=True):
            np.copyto(tensor.numpy(), values)
        return tensors

    def _of(self, index: int, shape: Sequence[int]) -> torch.Tensor:
        size = math.prod(shape)
        if self._memory[index].numel() < size:
            self._memory[index] = torch.empty(size, pin_memory=self._pinned)
        return self._memory[index][:size].view(*shape)
