"""TorchScript on an NVIDIA card. Needs torch with CUDA, the extra `unroll-engine[torchscript]`."""

from collections.abc import Sequence

import torch

from unroll_engine.errors import RuntimeUnavailableError
from unroll_engine.models.spec import Float32Array, State
from unroll_engine.runtimes.base import LaneState, TickResult
from unroll_engine.runtimes.cudnn import cudnn, prepare_for_cudnn
from unroll_engine.runtimes.lane_tensors import DeviceValues, LaneTensors
from unroll_engine.runtimes.torchscript import HostBuffers, load_module
from unroll_proto import bundle


class TorchScriptCudaRuntime:
    """Runs `model.ts` on a card, within the tolerance of eager PyTorch, not to the bit.

    Args:
        model: Content of `model.ts`.

    Raises:
        RuntimeUnavailableError: torch finds no CUDA device.
    """

    name = "torchscript"
    device = "cuda"
    artifact = bundle.TORCHSCRIPT
    bitwise = False
    variant = ""

    def __init__(self, model: bytes) -> None:
        if not torch.cuda.is_available():
            raise RuntimeUnavailableError("device cuda: torch finds no CUDA device")
        # TF32 keeps 10 bits of the mantissa, far outside the tolerance that was proven.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self._module = load_module(model, self.device)
        self._inputs = HostBuffers(pinned=True)
        self._uses_cudnn = prepare_for_cudnn(self._module)

    def run(self, x: Float32Array, state: State) -> TickResult[DeviceValues]:
        """See Runtime.run."""
        values, *tensors = self._inputs.filled(x, *state)
        return self._compute(values, [tensor.to(self.device, non_blocking=True) for tensor in tensors])

    def lane_state(self, initial: State, lanes: int, rows: int, input_size: int) -> LaneState:
        """See DeviceRuntime.lane_state."""
        return LaneTensors(self._compute, self.device, initial, lanes, rows, input_size)

    @torch.inference_mode()
    def _compute(self, values: torch.Tensor, state: Sequence[torch.Tensor]) -> TickResult[DeviceValues]:
        batch_major = values.to(self.device, non_blocking=True).transpose(0, 1)
        with cudnn(self._uses_cudnn):
            logits, states, *final = self._module(batch_major, *state)
        # Until then, the inputs may still be read.
        torch.cuda.current_stream().synchronize()
        steps = DeviceValues(logits.transpose(0, 1)), DeviceValues(states.transpose(0, 1))
        return TickResult(*steps, tuple(map(DeviceValues, final)))
