"""The step kernel as a runtime. It needs neither onnxruntime nor torch."""

from unroll_engine.kernel import Network, read_onnx
from unroll_engine.models.spec import Float32Array, State
from unroll_engine.runtimes.base import ArrayResult, TickResult
from unroll_proto import bundle


class KernelRuntime:
    """Runs the network of `model.onnx` in C++, with the same bits for a lane in any tick and on every CPU.

    Args:
        model: Content of `model.onnx`.

    Raises:
        RuntimeUnavailableError: the kernel can't run on this machine.
        UnsupportedNetworkError: the kernel can't express the network.

    Attributes:
        network: The network, which also runs sequences of any lengths.
        variant: Instruction set in use.
    """

    name = "kernel"
    device = "cpu"
    artifact = bundle.ONNX_RNN
    bitwise = True

    def __init__(self, model: bytes) -> None:
        self.network = Network(read_onnx(model))
        self.variant = self.network.isa

    def run(self, x: Float32Array, state: State) -> ArrayResult:
        """See Runtime.run."""
        return TickResult(*self.network.run(x, state))
