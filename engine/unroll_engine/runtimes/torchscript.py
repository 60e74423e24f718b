"""TorchScript, on CPU or CUDA. Needs torch, the extra `unroll-engine[torchscript]`.

Deprecated upstream since torch 2.11. TorchScript can run code, so it is loaded only from a bundle whose checksums hold.
"""

import io
import math
import warnings
import zipfile
from collections.abc import Sequence

import numpy as np
import torch

from unroll_engine.errors import RuntimeUnavailableError
from unroll_engine.models.spec import Float32Array, ModelSpec, State
from unroll_engine.runtimes.base import TickResult
from unroll_proto import bundle

_GROWTH = 2**20
_MOST_TENSORS = 4
"""Outputs of a network: logits, states, and up to two state tensors."""
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


class TorchScriptRuntime:
    """Runs `model.ts`, within the tolerance of eager PyTorch, not to the bit.

    Args:
        model: Content of `model.ts`.
        device: "cpu" or "cuda".

    Raises:
        RuntimeUnavailableError: the device is "cuda" and torch finds none.
    """

    name = "torchscript"
    artifact = bundle.TORCHSCRIPT
    bitwise = False
    variant = ""

    def __init__(self, model: bytes, device: str) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeUnavailableError("device cuda: torch finds no CUDA device")
        self.device = device
        torch.set_num_threads(1)
        # TF32 keeps 10 bits of the mantissa, far outside the tolerance that was proven.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.* is deprecated", category=DeprecationWarning)
            self._module = torch.jit.load(io.BytesIO(model), map_location=device)  # type: ignore[no-untyped-call]
        self._module.eval()
        on_device = device == "cuda"
        self._inputs, self._results = ([_Buffer(on_device) for _ in range(_MOST_TENSORS)] for _ in range(2))

    def run(self, x: Float32Array, state: State) -> TickResult:
        """See Runtime.run."""
        with torch.inference_mode():
            # Copied: torch needs writable memory, and a request's is not.
            given = zip(self._inputs, (x.transpose(1, 0, 2), *state), strict=False)
            arguments = [buffer.filled(values).to(self.device, non_blocking=True) for buffer, values in given]
            logits, states, *final = self._outputs(self._module(*arguments))
        return TickResult(logits.transpose(1, 0, 2), states.transpose(1, 0, 2), tuple(final))

    def _outputs(self, tensors: Sequence[torch.Tensor]) -> list[Float32Array]:
        """Returns the results in their own memory, since the next run overwrites the buffers."""
        if self.device == "cpu":
            return [tensor.numpy() for tensor in tensors]
        copies = [buffer.received(tensor) for buffer, tensor in zip(self._results, tensors, strict=False)]
        torch.cuda.current_stream().synchronize()
        return [copy.numpy().copy() for copy in copies]


class _Buffer:
    """Host memory that is reused by all runs and grows to the largest.

    Args:
        pinned: True to lock its pages, so that the device copies from and to it directly.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._memory = torch.empty(0)

    def filled(self, values: Float32Array) -> torch.Tensor:
        """Returns a C-contiguous copy of `values`."""
        tensor = self._of(values.shape)
        np.copyto(tensor.numpy(), values)
        return tensor

    def received(self, values: torch.Tensor) -> torch.Tensor:
        """Returns a copy of a device tensor, complete once the current stream is synchronized."""
        return self._of(values.shape).copy_(values, non_blocking=True)

    def _of(self, shape: Sequence[int]) -> torch.Tensor:
        size = math.prod(shape)
        if self._memory.numel() < size:
            self._memory = torch.empty(size, pin_memory=self._pinned)
        return self._memory[:size].view(*shape)
