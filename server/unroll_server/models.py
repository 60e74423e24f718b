"""Models that are ready to run: the repository's bundles, each in its runtime and warmed up."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from unroll_proto.bundle import BundleError
from unroll_proto.v1 import bundle_pb2
from unroll_server.bundle import VerifiedBundle, find_bundles, verify
from unroll_server.errors import StartupError
from unroll_server.runtimes.base import Runtime
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
    """

    spec: ModelSpec
    runtime: Runtime
    bitwise: bool
    max_abs_diff: float
    test_accuracy: float | None

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
    load = _loader(runtime, device)
    if not root.is_dir():
        raise StartupError(f"--models: {root} is not a folder")
    paths = find_bundles(root)
    if not paths:
        raise StartupError(f"--models: {root} holds no bundle, that is no folder NAME/VERSION/")
    models, problems = [], []
    for path in paths:
        try:
            models.append(_warm_up(load(verify(path)), max_lanes))
        except BundleError as error:
            _log.error("refused %s: %s", path, error)
            problems.append(str(error))
    if not models:
        raise StartupError(f"--models: no bundle under {root} can be served: {'; '.join(problems)}")
    return models


def _loader(runtime: str, device: str) -> Callable[[VerifiedBundle], Model]:
    """Picks what runs models; imported here, so that the other runtime's library need not be installed."""
    make: Callable[[bytes], Runtime]
    if runtime == "onnx" and device == "cpu":
        from unroll_server.runtimes.onnx import OnnxCpuRuntime

        kind, make = bundle_pb2.ARTIFACT_KIND_ONNX_SCAN, OnnxCpuRuntime
    elif runtime == "onnx":
        from unroll_server.runtimes.onnx import OnnxCudaRuntime

        kind, make = bundle_pb2.ARTIFACT_KIND_ONNX_RNN, OnnxCudaRuntime
    else:
        try:
            from unroll_server.runtimes.torchscript import TorchScriptRuntime
        except ModuleNotFoundError:
            problem = "--runtime torchscript: torch is missing; install unroll-server[torchscript]"
            raise StartupError(problem) from None

        kind, make = bundle_pb2.ARTIFACT_KIND_TORCHSCRIPT, lambda content: TorchScriptRuntime(content, device)

    def load(bundle: VerifiedBundle) -> Model:
        try:
            loaded = make(bundle.read(kind))
        except (BundleError, StartupError):
            raise
        except Exception as error:  # each library raises types of its own for a graph that it can't load
            raise BundleError(f"{bundle.path}: {_one_line(error)}") from error
        training = bundle.manifest.training
        return Model(
            spec=bundle.spec,
            runtime=loaded,
            bitwise=loaded.bitwise,
            max_abs_diff=bundle.max_abs_diff(kind),
            test_accuracy=training.test_accuracy if training.HasField("test_accuracy") else None,
        )

    return load


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _warm_up(model: Model, max_lanes: int) -> Model:
    """Runs the model at several lane counts, and withdraws the bits promise where this machine does not keep it."""
    spec, run = model.spec, model.runtime.run
    x = np.random.default_rng(0).standard_normal((4, max_lanes, spec.input_size), dtype=np.float32)
    try:
        whole = run(x, spec.zero_state(max_lanes))
        same = True
        for lanes in {count for count in (1, 2, 3, max_lanes // 2, max_lanes - 1) if 0 < count <= max_lanes}:
            part = run(np.ascontiguousarray(x[:, :lanes]), spec.zero_state(lanes))
            same &= part.states.tobytes() == whole.states[:, :lanes].tobytes()
            same &= part.logits.tobytes() == whole.logits[:, :lanes].tobytes()
    except Exception as error:  # as above: a graph that loads can still fail to run
        raise BundleError(f"{spec.key} does not run: {_one_line(error)}") from error
    if model.bitwise and not same:
        _log.warning("%s: this machine does not give the same bits at every batch size", spec.key)
        return replace(model, bitwise=False)
    return model
