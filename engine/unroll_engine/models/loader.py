"""Loads verified bundles into their runtimes, and warms them up."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from unroll_engine.bundle import VerifiedBundle
from unroll_engine.errors import RuntimeUnavailableError
from unroll_engine.kernel import NetworkWeights, UnsupportedNetworkError, read_onnx, unavailable_reason
from unroll_engine.models.calibration import difference_of, keeps_bits, problem_of, tick_cost
from unroll_engine.models.spec import ModelSpec
from unroll_engine.runtimes.base import Runtime
from unroll_engine.scheduler import TickCost, capacity_of
from unroll_proto.bundle import ONNX_RNN, BundleError
from unroll_proto.v1 import bundle_pb2

_log = logging.getLogger(__name__)

_CELLS: dict[str, tuple[str, ...]] = {
    "simple_rnn": ("rnn_tanh", "rnn_relu"),
    "simple_lstm": ("lstm",),
    "simple_gru": ("gru", "gru_reset_before"),
}
"""The cells of each architecture."""


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A model version that is ready to run.

    Attributes:
        spec: Its sizes, labels and names.
        runtime: Computes its timesteps.
        bitwise: True if the same bits are promised: the runtime claims them and this machine kept them in a test.
        max_abs_diff: Largest absolute difference of the artifact from eager PyTorch, from the proof.
        test_accuracy: From the training summary; None without a test split.
        cost: Cost of a tick on this machine.
        runtime_note: Reason why the step kernel does not run it; empty if it does, or if another runtime was chosen.
    """

    spec: ModelSpec
    runtime: Runtime
    bitwise: bool
    max_abs_diff: float
    test_accuracy: float | None
    cost: TickCost
    runtime_note: str = ""

    @property
    def runtime_text(self) -> str:
        """Runtime, with its instruction set or the reason for not using the kernel: "kernel (x86-64-v4)"."""
        details = self.runtime.variant or self.runtime_note
        return f"{self.runtime.name} ({details})" if details else self.runtime.name

    @property
    def states_are_state(self) -> bool:
        """True if the last layer's hidden state at a step is the whole state of the sequence after it."""
        return len(self.spec.states) == self.spec.num_layers == 1


class Loader:
    """Makes verified bundles ready to run.

    Args:
        runtime: "kernel", "onnx", "torchscript"; or "auto": the step kernel where it can run a model, else onnx.
        device: "cpu" or "cuda".
        max_lanes: Lanes of the widest tick, for the warm-up.

    Raises:
        RuntimeUnavailableError: the runtime can't be used here.
    """

    def __init__(self, runtime: str, device: str, max_lanes: int) -> None:
        self._runtime, self._device, self._max_lanes = runtime, device, max_lanes
        self._kernel_note = ""
        if runtime in ("auto", "kernel"):
            self._kernel_note = "it runs on the CPU only" if device != "cpu" else unavailable_reason() or ""
        if runtime == "kernel" and self._kernel_note:
            raise RuntimeUnavailableError(f"runtime kernel: {self._kernel_note}")
        self._torchscript = _torchscript(device) if runtime == "torchscript" else None

    def load(self, bundle: VerifiedBundle, others: Sequence[Model] = ()) -> Model:
        """Checks the graphs of a bundle, loads and warms them up.

        The promise of bits is withdrawn if this machine does not keep it.

        Args:
            bundle: The bundle.
            others: Loaded models; measurements of one of the same sizes are reused.

        Raises:
            BundleError: it can't be trusted, loaded or run.
            RuntimeUnavailableError: there is no such device.
        """
        try:
            if bundle.spec.step:
                kind = bundle_pb2.ARTIFACT_KIND_ONNX_STEP
                runtime, note = self._step(bundle), f"a {bundle.spec.architecture} model"
                _check_results(runtime, bundle)
            elif self._torchscript:
                kind = bundle_pb2.ARTIFACT_KIND_TORCHSCRIPT
                runtime, note = self._torchscript(bundle.read(kind), bundle.spec), ""
                _check_results(runtime, bundle)
            else:
                kind = bundle_pb2.ARTIFACT_KIND_ONNX_RNN
                runtime, note = self._onnx(bundle)
            return self._model(bundle, kind, runtime, others, note)
        except (BundleError, RuntimeUnavailableError):
            raise
        except Exception as error:  # each library raises its own exceptions for a graph that it can't load or run
            raise BundleError(f"{bundle.path}: does not run: {_one_line(error)}") from error

    def _step(self, bundle: VerifiedBundle) -> Runtime:
        """Returns the runtime of an imported graph."""
        from unroll_engine.runtimes.step import StepRuntime
        from unroll_engine.runtimes.whole import WholeRuntime

        if self._runtime not in ("auto", "onnx") or self._device != "cpu":
            wanted = f"{self._runtime} on {self._device}"
            which = f"a {bundle.spec.architecture} model"
            raise BundleError(f"{bundle.path}: {wanted} can't run it: {which} is run by onnx on cpu")
        content = bundle.read(bundle_pb2.ARTIFACT_KIND_ONNX_STEP)
        try:
            return (WholeRuntime if bundle.spec.whole else StepRuntime)(content, bundle.manifest.step)
        except (UnsupportedNetworkError, ValueError) as error:
            raise BundleError(f"{bundle.path}: {ONNX_RNN}: {error}") from None

    def _onnx(self, bundle: VerifiedBundle) -> tuple[Runtime, str]:
        """Returns the first runtime that computes what `model.onnx` does, and the reason if it is not the kernel."""
        from unroll_engine.runtimes.onnx import OnnxCudaRuntime, OnnxOperatorRuntime

        # Loads the very bytes that were checked.
        content = bundle.read(bundle_pb2.ARTIFACT_KIND_ONNX_RNN)
        weights = _network_of(content, bundle)
        if self._device == "cuda":
            runtime: Runtime = OnnxCudaRuntime(content)
            _check_results(runtime, bundle)
            return runtime, self._kernel_note
        note, problem = self._kernel_note, ""
        # The proof covers the file itself, so a graph made of its weights is compared with it.
        reference = OnnxOperatorRuntime(content)
        for runtime in self._candidates(content):
            _check_results(runtime, bundle)
            problem = difference_of(runtime, reference, weights, bundle.spec)
            if not problem:
                return runtime, note
            note = note or problem
        raise BundleError(f"{bundle.path}: {self._runtime} can't run it: {problem}")

    def _candidates(self, content: bytes) -> Iterator[Runtime]:
        if self._runtime in ("auto", "kernel") and not self._kernel_note:
            from unroll_engine.runtimes.kernel import KernelRuntime

            yield KernelRuntime(content)
        if self._runtime in ("auto", "onnx"):
            from unroll_engine.runtimes.onnx import OnnxCpuRuntime

            yield OnnxCpuRuntime(content)

    def _model(
        self,
        bundle: VerifiedBundle,
        kind: "bundle_pb2.ArtifactKind.ValueType",
        runtime: Runtime,
        others: Sequence[Model],
        note: str,
    ) -> Model:
        spec, max_lanes = bundle.spec, self._max_lanes
        bitwise = runtime.bitwise and keeps_bits(runtime, spec, capacity_of(max_lanes))
        alike = (each for each in others if _sizes(each.spec) == _sizes(spec) and each.runtime.name == runtime.name)
        like = next(alike, None)
        if runtime.bitwise and not bitwise:
            _log.warning("%s: this machine does not give the same bits at every batch size", spec.key)
        training = bundle.manifest.training
        return Model(
            spec=spec,
            runtime=runtime,
            bitwise=bitwise,
            max_abs_diff=bundle.max_abs_diff(kind),
            test_accuracy=training.test_accuracy if training.HasField("test_accuracy") else None,
            cost=like.cost if like else tick_cost(runtime, spec, max_lanes),
            runtime_note=note,
        )


def _network_of(content: bytes, bundle: VerifiedBundle) -> NetworkWeights:
    """Reads `model.onnx`; raises BundleError if it is not a network of the manifest's architecture and sizes."""
    spec = bundle.spec
    try:
        weights = read_onnx(content)
    except UnsupportedNetworkError as error:
        raise BundleError(f"{bundle.path}: {ONNX_RNN}: {error}") from None
    layers = [(layer.input.shape[1], layer.recurrent.shape[1]) for layer in weights.layers]
    widths = [spec.input_size] + [spec.hidden_size] * (spec.num_layers - 1)
    found = (weights.cell, layers, weights.readout.shape)
    expected = (weights.cell, [(width, spec.hidden_size) for width in widths], (spec.output_size, spec.hidden_size))
    if found != expected or weights.cell not in _CELLS[spec.architecture]:
        problem = f"{weights.cell} of layers {layers[:8]} and {len(weights.readout)} outputs"
        raise BundleError(f"{bundle.path}: {ONNX_RNN}: {problem}, which is not what the manifest says")
    return weights


def _check_results(runtime: Runtime, bundle: VerifiedBundle) -> None:
    problem = problem_of(runtime, bundle.spec)
    if problem:
        raise BundleError(f"{bundle.path}: {runtime.artifact} gives {problem}")


def _torchscript(device: str) -> Callable[[bytes, ModelSpec], Runtime]:
    try:
        from unroll_engine.runtimes.torchscript import TorchScriptRuntime, check_archive
        from unroll_engine.runtimes.torchscript_cuda import TorchScriptCudaRuntime
    except ModuleNotFoundError:
        problem = "runtime torchscript: torch is missing; install unroll-engine[torchscript]"
        raise RuntimeUnavailableError(problem) from None

    def made(content: bytes, spec: ModelSpec) -> Runtime:
        check_archive(content, spec)
        return (TorchScriptRuntime if device == "cpu" else TorchScriptCudaRuntime)(content)

    return made


def _sizes(spec: ModelSpec) -> tuple[object, ...]:
    """The properties that a run's cost depends on."""
    # Step models of the same sizes can be very different graphs.
    of_step = spec.bundle if spec.step else b""
    return spec.architecture, spec.input_size, spec.hidden_size, spec.output_size, spec.num_layers, of_step


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
