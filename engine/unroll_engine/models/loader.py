"""Loads verified bundles into their runtimes, and warms them up."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from unroll_engine.bundle import VerifiedBundle
from unroll_engine.errors import RuntimeUnavailableError
from unroll_engine.kernel import UnsupportedNetworkError, unavailable_reason
from unroll_engine.models.calibration import FormTiming, choose, difference_of, keeps_bits, problem_of, tick_cost
from unroll_engine.models.spec import ModelSpec
from unroll_engine.runtimes.base import Runtime
from unroll_engine.scheduler import TickCost, capacity_of
from unroll_proto.bundle import BundleError, artifact_of
from unroll_proto.v1 import bundle_pb2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A model version that is ready to run.

    Attributes:
        spec: Its sizes, labels and names.
        runtime: Computes its timesteps.
        bitwise: Whether the same bits are promised: the runtime claims them and this machine showed them.
        max_abs_diff: Largest absolute difference of the artifact from eager PyTorch, from the proof.
        test_accuracy: From the training summary; None without a test split.
        cost: Of a tick on this machine.
        timings: Measurements of the graph forms to choose from; empty if there is only one.
    """

    spec: ModelSpec
    runtime: Runtime
    bitwise: bool
    max_abs_diff: float
    test_accuracy: float | None
    cost: TickCost
    timings: tuple[FormTiming, ...] = ()
    runtime_note: str = ""

    @property
    def states_are_state(self) -> bool:
        """Whether the last layer's hidden state at a step is the whole state of the sequence after it."""
        return self.spec.state_shapes == ((1, self.spec.hidden_size),)


class _Form(NamedTuple):
    """A graph form: its artifact, its check, and its runtime."""

    kind: "bundle_pb2.ArtifactKind.ValueType"
    check: Callable[[bytes, ModelSpec], None]
    make: Callable[[bytes], Runtime]


class Loader:
    """Makes verified bundles ready to run.

    Args:
        runtime: "kernel", "onnx", "torchscript"; or "auto": the step kernel where it can run a model, else onnx.
        device: "cpu" or "cuda".
        max_lanes: Widest tick, warmed up for.

    Raises:
        RuntimeUnavailableError: the runtime can't be used here.
    """

    def __init__(self, runtime: str, device: str, max_lanes: int) -> None:
        self._kernel, self._note = _kernel_form(runtime, device)
        self._forms = _forms(runtime, device)
        self._max_lanes = max_lanes

    def load(self, bundle: VerifiedBundle, others: Sequence[Model] = ()) -> Model:
        """Checks the graphs of a bundle, loads and warms them up.

        The bits promise is withdrawn where this machine does not keep it.

        Args:
            bundle: The bundle.
            others: Models that are loaded: what was measured of one of the same sizes is not measured again.

        Raises:
            BundleError: it can't be trusted, loaded or run.
            RuntimeUnavailableError: the device is not there.
        """
        try:
            kernel, note = self._kernel_runtime(bundle)
            if kernel:
                return self._model(bundle, bundle_pb2.ARTIFACT_KIND_ONNX_RNN, [kernel], others, "")
            if not self._forms:
                raise BundleError(f"{bundle.path}: the step kernel can't run it: {note}")
            loaded = [self._made(form, bundle) for form in self._forms]
            return self._model(bundle, self._forms[0].kind, loaded, others, note)
        except (BundleError, RuntimeUnavailableError):
            raise
        except Exception as error:  # each library raises types of its own for a graph that it can't load or run
            raise BundleError(f"{bundle.path}: does not run: {_one_line(error)}") from error

    def _kernel_runtime(self, bundle: VerifiedBundle) -> tuple[Runtime | None, str]:
        """The step kernel with a bundle's network, or why it can't run that."""
        if self._kernel is None:
            return None, self._note
        try:
            runtime = self._made(self._kernel, bundle)
        except UnsupportedNetworkError as error:
            return None, str(error)
        # The proof of the artifact was made with onnxruntime, so the kernel is held against that.
        problem = difference_of(runtime, self._reference(bundle), bundle.spec)
        return (None, problem) if problem else (runtime, "")

    def _model(
        self,
        bundle: VerifiedBundle,
        kind: "bundle_pb2.ArtifactKind.ValueType",
        loaded: Sequence[Runtime],
        others: Sequence[Model],
        note: str,
    ) -> Model:
        spec, max_lanes = bundle.spec, self._max_lanes
        alike = (other for other in others if _sizes(other.spec) == _sizes(spec))
        like = next((other for other in alike if other.runtime.name == loaded[0].name), None)
        bitwise = loaded[0].bitwise and keeps_bits(loaded[0], spec, capacity_of(max_lanes))
        runtime, timings = choose(loaded, spec, max_lanes, like.timings if like else ())
        same = like is not None and like.timings == timings
        cost = like.cost if like and same else tick_cost(runtime, spec, max_lanes)
        if loaded[0].bitwise and not bitwise:
            _log.warning("%s: this machine does not give the same bits at every batch size", spec.key)
        if note:
            _log.info("%s: onnxruntime runs it, not the step kernel: %s", spec.key, note)
        training = bundle.manifest.training
        return Model(
            spec=spec,
            runtime=runtime,
            bitwise=bitwise,
            max_abs_diff=bundle.max_abs_diff(kind),
            test_accuracy=training.test_accuracy if training.HasField("test_accuracy") else None,
            cost=cost,
            timings=timings,
            runtime_note=note,
        )

    @staticmethod
    def _reference(bundle: VerifiedBundle) -> Runtime:
        from unroll_engine.runtimes.onnx import OnnxOperatorRuntime

        return OnnxOperatorRuntime(bundle.read(bundle_pb2.ARTIFACT_KIND_ONNX_RNN))

    @staticmethod
    def _made(form: _Form, bundle: VerifiedBundle) -> Runtime:
        # The bytes that are loaded are those that were checked.
        content = bundle.read(form.kind)
        form.check(content, bundle.spec)
        runtime = form.make(content)
        problem = problem_of(runtime, bundle.spec)
        if problem:
            raise BundleError(f"{bundle.path}: {artifact_of(bundle.manifest, form.kind).file} gives {problem}")
        return runtime


def _kernel_form(runtime: str, device: str) -> tuple[_Form | None, str]:
    """The step kernel if it was asked for and can run here, or why it can't."""
    if runtime not in ("auto", "kernel"):
        return None, ""
    reason = "it runs on the CPU only" if device != "cpu" else unavailable_reason()
    if reason is None:
        from unroll_engine.runtimes.kernel import KernelRuntime
        from unroll_engine.runtimes.onnx_graph import check_rnn

        return _Form(bundle_pb2.ARTIFACT_KIND_ONNX_RNN, check_rnn, KernelRuntime), ""
    if runtime == "kernel":
        raise RuntimeUnavailableError(f"runtime kernel: {reason}")
    return None, reason


def _forms(runtime: str, device: str) -> list[_Form]:
    """What runs models beside the kernel, the form of choice first; another runtime's library need not be installed."""
    if runtime == "kernel":
        return []
    if runtime in ("auto", "onnx") and device == "cpu":
        from unroll_engine.runtimes.onnx import OnnxCpuRuntime, OnnxOperatorRuntime
        from unroll_engine.runtimes.onnx_graph import check_rnn, check_scan

        return [
            _Form(bundle_pb2.ARTIFACT_KIND_ONNX_SCAN, check_scan, OnnxCpuRuntime),
            _Form(bundle_pb2.ARTIFACT_KIND_ONNX_RNN, check_rnn, OnnxOperatorRuntime),
        ]
    if runtime in ("auto", "onnx"):
        from unroll_engine.runtimes.onnx import OnnxCudaRuntime
        from unroll_engine.runtimes.onnx_graph import check_rnn

        return [_Form(bundle_pb2.ARTIFACT_KIND_ONNX_RNN, check_rnn, OnnxCudaRuntime)]
    try:
        from unroll_engine.runtimes.torchscript import TorchScriptRuntime, check_archive
    except ModuleNotFoundError:
        problem = "runtime torchscript: torch is missing; install unroll-engine[torchscript]"
        raise RuntimeUnavailableError(problem) from None

    kind = bundle_pb2.ARTIFACT_KIND_TORCHSCRIPT
    return [_Form(kind, check_archive, lambda content: TorchScriptRuntime(content, device))]


def _sizes(spec: ModelSpec) -> tuple[object, ...]:
    """The properties that a run's cost depends on."""
    return spec.architecture, spec.input_size, spec.hidden_size, spec.output_size, spec.num_layers


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
