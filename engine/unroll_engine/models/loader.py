"""Models that are ready to run: verified bundles, each in its runtime and warmed up."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from unroll_engine.bundle import VerifiedBundle
from unroll_engine.errors import RuntimeUnavailableError
from unroll_engine.models.calibration import FormTiming, choose, keeps_bits, problem_of, tick_cost
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
        spec: What it takes and gives.
        runtime: What runs it.
        bitwise: Whether the same bits are promised: the runtime claims them and this machine showed them.
        max_abs_diff: From the proof: the largest absolute difference of the artifact from eager PyTorch.
        test_accuracy: From the training summary; None where there was no test split.
        cost: What a tick's run of it costs here.
        timings: How the forms compared that could run it; empty where there was but one.
    """

    spec: ModelSpec
    runtime: Runtime
    bitwise: bool
    max_abs_diff: float
    test_accuracy: float | None
    cost: TickCost
    timings: tuple[FormTiming, ...] = ()

    @property
    def states_are_state(self) -> bool:
        """Whether the last layer's state at a step is all of the sequence's state after that step."""
        return self.spec.state_shapes == ((1, self.spec.hidden_size),)


class Loader:
    """Makes verified bundles ready to run.

    Args:
        runtime: "onnx" or "torchscript".
        device: "cpu" or "cuda".
        max_lanes: Widest tick, warmed up for.

    Raises:
        RuntimeUnavailableError: the runtime's library is not installed.
    """

    def __init__(self, runtime: str, device: str, max_lanes: int) -> None:
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
        spec, forms, max_lanes = bundle.spec, self._forms, self._max_lanes
        like = next((other for other in others if _sizes(other.spec) == _sizes(spec)), None)
        try:
            loaded = [self._made(form, bundle) for form in forms]
            bitwise = loaded[0].bitwise and keeps_bits(loaded[0], spec, capacity_of(max_lanes))
            runtime, timings = choose(loaded, spec, max_lanes, like.timings if like else ())
            same = like is not None and like.timings == timings
            cost = like.cost if like and same else tick_cost(runtime, spec, max_lanes)
        except (BundleError, RuntimeUnavailableError):
            raise
        except Exception as error:  # each library raises types of its own for a graph that it can't load or run
            raise BundleError(f"{bundle.path}: does not run: {_one_line(error)}") from error
        if loaded[0].bitwise and not bitwise:
            _log.warning("%s: this machine does not give the same bits at every batch size", spec.key)
        training = bundle.manifest.training
        return Model(
            spec=spec,
            runtime=runtime,
            bitwise=bitwise,
            max_abs_diff=bundle.max_abs_diff(forms[0].kind),
            test_accuracy=training.test_accuracy if training.HasField("test_accuracy") else None,
            cost=cost,
            timings=timings,
        )

    @staticmethod
    def _made(form: "_Form", bundle: VerifiedBundle) -> Runtime:
        # What is checked is what is loaded: the very bytes whose checksum was found right.
        content = bundle.read(form.kind)
        form.check(content, bundle.spec)
        runtime = form.make(content)
        problem = problem_of(runtime, bundle.spec)
        if problem:
            raise BundleError(f"{bundle.path}: {artifact_of(bundle.manifest, form.kind).file} gives {problem}")
        return runtime


class _Form(NamedTuple):
    """An artifact and what runs it."""

    kind: "bundle_pb2.ArtifactKind.ValueType"
    check: Callable[[bytes, ModelSpec], None]
    make: Callable[[bytes], Runtime]


def _forms(runtime: str, device: str) -> list[_Form]:
    """Picks what runs models, the form of choice first; the other runtime's library need not be installed."""
    if runtime == "onnx" and device == "cpu":
        from unroll_engine.runtimes.onnx import OnnxCpuRuntime, OnnxOperatorRuntime
        from unroll_engine.runtimes.onnx_graph import check_rnn, check_scan

        return [
            _Form(bundle_pb2.ARTIFACT_KIND_ONNX_SCAN, check_scan, OnnxCpuRuntime),
            _Form(bundle_pb2.ARTIFACT_KIND_ONNX_RNN, check_rnn, OnnxOperatorRuntime),
        ]
    if runtime == "onnx":
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
    """What a run's cost depends on."""
    return spec.architecture, spec.input_size, spec.hidden_size, spec.output_size, spec.num_layers


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
