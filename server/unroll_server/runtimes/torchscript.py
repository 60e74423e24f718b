"""TorchScript, on CPU or CUDA. Needs torch, the extra `unroll-server[torchscript]`.

Deprecated upstream since torch 2.11, and a bundle's TorchScript can run code: it is loaded only from a bundle whose
checksums hold.
"""

import io
import warnings

import numpy as np
import torch

from unroll_proto import bundle
from unroll_server.errors import StartupError
from unroll_server.runtimes.base import TickResult
from unroll_server.types import Float32Array, State


class TorchScriptRuntime:
    """Runs `model.ts`. Within the tolerance of eager PyTorch, not to the bit.

    Args:
        model: Content of `model.ts`.
        device: "cpu" or "cuda".

    Raises:
        StartupError: the device is "cuda" and torch finds none.
    """

    name = "torchscript"
    artifact = bundle.TORCHSCRIPT
    bitwise = False

    def __init__(self, model: bytes, device: str) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise StartupError("--device cuda: torch finds no CUDA device")
        self.device = device
        torch.set_num_threads(1)
        # TF32 keeps 10 bits of the mantissa, far outside the tolerance that was proven.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.* is deprecated", category=DeprecationWarning)
            self._module = torch.jit.load(io.BytesIO(model), map_location=device)  # type: ignore[no-untyped-call]
        self._module.eval()

    def run(self, x: Float32Array, state: State) -> TickResult:
        """See Runtime.run."""
        with torch.inference_mode():
            # Copied: torch wants memory that it may write to, and a request's is not.
            batch_major = torch.from_numpy(np.array(x.transpose(1, 0, 2), order="C")).to(self.device)
            initial = torch.from_numpy(np.array(state[0], order="C")).to(self.device)
            logits, states, final = (tensor.cpu().numpy() for tensor in self._module(batch_major, initial))
        return TickResult(logits.transpose(1, 0, 2), states.transpose(1, 0, 2), (final,))
