"""Models that are ready to run: the repository's bundles, each in its runtime and warmed up."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from unroll_proto.bundle import BundleError
from unroll_proto.v1 import bundle_pb2
from unroll_server.bundle import VerifiedBundle, find_bundles, verify
from unroll_server.errors import StartupError
from unroll_server.forms import FormTiming, choose, keeps_bits, tick_cost
from unroll_server.runtimes.base import Runtime
from unroll_server.scheduler import TickCost, capacity_of
from unroll_server.types import ModelSpec

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


def load_repository(root: Path, runtime: str, device: str, max_lanes: int) -> list[Model]:
    """Loads every version of every model under `root` that can be trusted; logs why the others can't.

    Args:
        root: Folder of `NAME/VERSION/` bundles.
        runtime: "onnx" or "torchscript".
        device: "cpu" or "cuda".
        max_lanes: Widest tick, warmed up for.

    Raises:
        StartupError: there is no such folder, or nothing in it can be served.
    """
    forms = _forms(runtime, device)
    if not root.is_dir():
        raise StartupError(f"--models: {root} is not a folder")
    paths = find_bundles(root)
    if not paths:
        raise StartupError(f"--models: {root} holds no bundle, that is no folder NAME/VERSION/")
    models, problems = [], []
    for path in paths:
        try:
            models.append(_load(verify(path), forms, max_lanes))
        except BundleError as error:
            _log.error("refused %s: %s", path, error)
            problems.append(str(error))
    if not models:
        raise StartupError(f"--models: no bundle under {root} can be served: {'; '.join(problems)}")
    return models


class _Form(NamedTuple):
    """An artifact and what runs it."""

    kind: "bundle_pb2.ArtifactKind.ValueType"
    make: Callable[[bytes], Runtime]


def _forms(runtime: str, device: str) -> list[_Form]:
    """Picks what runs models, the form of choice first; the other runtime's library need not be installed."""
    if runtime == "onnx" and device == "cpu":
        from unroll_server.runtimes.onnx import OnnxCpuRuntime, OnnxOperatorRuntime

        return [
            _Form(bundle_pb2.ARTIFACT_KIND_ONNX_SCAN, OnnxCpuRuntime),
            _Form(bundle_pb2.ARTIFACT_KIND_ONNX_RNN, OnnxOperatorRuntime),
        ]
    if runtime == "onnx":
        from unroll_server.runtimes.onnx import OnnxCudaRuntime

        return [_Form(bundle_pb2.ARTIFACT_KIND_ONNX_RNN, OnnxCudaRuntime)]
    try:
        from unroll_server.runtimes.torchscript import TorchScriptRuntime
    except ModuleNotFoundError:
        problem = "--runtime torchscript: torch is missing; install unroll-server[torchscript]"
        raise StartupError(problem) from None

    return [_Form(bundle_pb2.ARTIFACT_KIND_TORCHSCRIPT, lambda content: TorchScriptRuntime(content, device))]


def _load(bundle: VerifiedBundle, forms: Sequence[_Form], max_lanes: int) -> Model:
    """Makes a bundle ready to run; the bits promise is withdrawn where this machine does not keep it."""
    spec = bundle.spec
    widest = capacity_of(max_lanes)
    try:
        loaded = [form.make(bundle.read(form.kind)) for form in forms]
        bitwise = loaded[0].bitwise and keeps_bits(loaded[0], spec, widest)
        runtime, timings = choose(loaded, spec, max_lanes)
        cost = tick_cost(runtime, spec, max_lanes)
    except (BundleError, StartupError):
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
