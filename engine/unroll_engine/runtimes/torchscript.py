"""TorchScript, on CPU or CUDA. Needs torch, the extra `unroll-engine[torchscript]`.

Deprecated upstream since torch 2.11. TorchScript can run code, so it is loaded only from a bundle whose checksums hold.
"""

import io
import math
import threading
import warnings
import zipfile
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unroll_engine.errors import RuntimeUnavailableError
from unroll_engine.kernel.exact import ULPS, UNIT, UNITS
from unroll_engine.models.spec import Float32Array, ModelSpec, State
from unroll_engine.runtimes.base import TickResult, Values
from unroll_proto import bundle

_GROWTH = 2**20
_MOST_TENSORS = 3
"""Inputs of a network: values, and up to two state tensors."""
_NETWORKS = {1: torch.nn.RNN, 3: torch.nn.GRU, 4: torch.nn.LSTM}
"""PyTorch's networks by the number of their gates."""
_LAYER_WEIGHTS = 4
"""Tensors of a layer: weights of its input and of its state, and the biases of both."""
_cudnn = threading.Lock()
"""Held while cuDNN is on or off for a run, which is a setting of the process."""
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
        self._inputs = [_Buffer(on_device) for _ in range(_MOST_TENSORS)]
        # On the CPU there is no cuDNN to turn off.
        self._uses_cudnn = not on_device or _prepare_for_cudnn(self._module)

    def run(self, x: Float32Array, state: State) -> TickResult[Values]:
        """See Runtime.run."""
        with torch.inference_mode():
            # Copied: torch needs writable memory, and a request's is not.
            given = zip(self._inputs, (x, *state), strict=False)
            values, *tensors = [buffer.filled(array).to(self.device, non_blocking=True) for buffer, array in given]
            if self.device == "cpu":
                logits, states, *final = self._module(values.transpose(0, 1), *tensors)
                steps = logits.transpose(0, 1).numpy(), states.transpose(0, 1).numpy()
                return TickResult(*steps, tuple([each.numpy() for each in final]))
            with _cudnn, torch.backends.cudnn.flags(enabled=self._uses_cudnn, allow_tf32=False):
                logits, states, *final = self._module(values.transpose(0, 1), *tensors)
            torch.cuda.current_stream().synchronize()
        steps = DeviceValues(logits.transpose(0, 1)), DeviceValues(states.transpose(0, 1))
        return TickResult(*steps, tuple(map(DeviceValues, final)))


class DeviceValues:
    """Values in the memory of a device; see Values. Few of a tick's results are read, so most stay there.

    Args:
        tensor: The values.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, key: Any) -> NDArray[Any]:
        parts = key if isinstance(key, tuple) else (key,)
        is_list = (list, np.ndarray)
        chosen = self._tensor[tuple([torch.as_tensor(part) if isinstance(part, is_list) else part for part in parts])]
        return chosen.cpu().numpy()

    def __array__(self, dtype: None = None, /, *, copy: bool | None = None) -> NDArray[Any]:
        return self._tensor.cpu().numpy()


def _prepare_for_cudnn(module: Any) -> bool:
    """Puts the weights of a network on a card in the order of cuDNN; returns False if cuDNN must not run it."""
    rnn, relu = module.rnn, "rnn_relu" in str(module.inlined_graph)
    names = [name for name, _ in rnn.named_parameters()]
    weights = [getattr(rnn, name) for name in names]
    (rows, input_size), hidden_size, layers = weights[0].shape, weights[1].shape[1], len(names) // _LAYER_WEIGHTS
    gates = rows // hidden_size
    # The mode of a network of tanh is 1, of ReLU 0.
    mode = {1: 0 if relu else 1, 4: 2, 3: 3}[gates]
    with torch.no_grad():
        torch._cudnn_rnn_flatten_weight(weights, _LAYER_WEIGHTS, input_size, mode, hidden_size, 0, layers, True, False)
    return relu or tanh_is_exact(gates, hidden_size, layers, "cuda")


@cache
@torch.inference_mode()
def tanh_is_exact(gates: int, hidden_size: int, layers: int, device: str) -> bool:
    """Returns True if PyTorch's tanh is within the bound of the proof in networks of a size.

    That of cuDNN 9.19 on an H100 is off by 2^-17 in those of 128 units, and by 2^-23 in those of 512.

    Args:
        gates: 1 of an RNN, 3 of a GRU, 4 of an LSTM.
        hidden_size: Units of a layer.
        layers: Number of layers.
        device: "cpu" or "cuda".
    """
    network = _NETWORKS[gates](hidden_size, hidden_size, layers).to(device)
    for parameter in network.parameters():
        parameter.zero_()
    # The state is the tanh of the features: other gates are open or closed.
    first = min(gates - 1, 2) * hidden_size
    network.weight_ih_l0[first : first + hidden_size] = torch.eye(hidden_size)
    if gates > 1:
        network.bias_ih_l0[:hidden_size] = 100
        network.bias_ih_l0[hidden_size : 2 * hidden_size] = -100
    x = torch.linspace(-4, 4, 64 * hidden_size, device=device).view(1, 64, hidden_size)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        final = network(x)[1]
    state = final[1] if isinstance(final, tuple) else final
    return bool((state[0].double() - x[0].double().tanh()).abs().max() <= (2 * ULPS + UNITS) * UNIT)


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

    def _of(self, shape: Sequence[int]) -> torch.Tensor:
        size = math.prod(shape)
        if self._memory.numel() < size:
            self._memory = torch.empty(size, pin_memory=self._pinned)
        return self._memory[:size].view(*shape)
