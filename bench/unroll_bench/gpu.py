"""Correctness and speed of every cell on a CUDA card: the proof's bound, the bits, and the rate against eager cuDNN.

`python -m unroll_bench.gpu` (`make gpu`) needs torch with CUDA, numpy, protobuf, googleapis-common-protos, no network,
and a few minutes. If onnx and onnxruntime-gpu are installed, the CUDA provider is tried too. Without a card or a
package it reports that and ends. `--device cpu` does the same on the CPU.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from unroll_engine.models.loader import Model
    from unroll_engine.runtimes.base import Runtime
    from unroll_export.model import Cell, Nonlinearity, RecurrentClassifier

NETWORKS: "Mapping[str, tuple[Cell, Nonlinearity]]" = {
    "rnn": ("rnn", "tanh"),
    "relu": ("rnn", "relu"),
    "lstm": ("lstm", "tanh"),
    "gru": ("gru", "tanh"),
}
PACKAGES = {
    "torch": "torch",
    "numpy": "numpy",
    "protobuf": "google.protobuf",
    "googleapis-common-protos": "google.rpc",
}
"""Packages that it needs, and a module of each."""
FEATURES, CLASSES, STEPS = 12, 9, 64
HIDDEN, LANES = (128, 512, 1024), (64, 1024)
BAR = 0.9
"""Share of eager cuDNN's rate that the engine must reach, end to end."""


class Rate(NamedTuple):
    """Timesteps per second for one size."""

    eager: float
    engine: float


def _is_missing(module: str) -> bool:
    try:
        return find_spec(module) is None
    except ModuleNotFoundError:  # a package around it is missing
        return True


def reason_to_skip(device: str) -> str:
    """Returns the reason why nothing can be tried here; empty if it can."""
    for package, module in PACKAGES.items():
        if _is_missing(module):
            return f"{package} is not installed"
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return ""


def network(name: str, hidden: int, layers: int) -> "RecurrentClassifier[Any]":
    """Makes a network of random weights; equal arguments give equal weights."""
    import torch

    from unroll_export.model import build

    cell, nonlinearity = NETWORKS[name]
    torch.manual_seed(0)
    model = build(cell, FEATURES, hidden, CLASSES, layers, nonlinearity=nonlinearity).eval()
    model.mean.uniform_(-1, 1)
    model.std.uniform_(0.5, 2)
    return model.requires_grad_(False)


def runtimes(device: str) -> "tuple[dict[str, Callable[[bytes], Runtime]], str]":
    """Returns the runtimes to try by file of the bundle, and the reason for one that is left out."""
    from unroll_engine.runtimes.torchscript import TorchScriptRuntime
    from unroll_engine.runtimes.torchscript_cuda import TorchScriptCudaRuntime

    on_device: Callable[[bytes], Runtime] = TorchScriptRuntime if device == "cpu" else TorchScriptCudaRuntime
    found = {"model.ts": on_device}
    for module in ("onnx", "onnxruntime"):
        if _is_missing(module):
            return found, f"onnxruntime's provider is left out: {module} is not installed"
    import onnxruntime

    from unroll_engine.runtimes.onnx import OnnxCudaRuntime, OnnxOperatorRuntime

    if device == "cpu":
        return found | {"model.onnx": OnnxOperatorRuntime}, ""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return found, "onnxruntime's provider is left out: this onnxruntime has none for CUDA"
    return found | {"model.onnx": OnnxCudaRuntime}, ""


def artifact(model: "RecurrentClassifier[Any]", file: str) -> bytes:
    """Makes a file of the bundle."""
    if file == "model.ts":
        from unroll_export.graphs.torchscript import build_torchscript

        return build_torchscript(model)
    from unroll_export.graphs.onnx_rnn import build_onnx_rnn

    return build_onnx_rnn(model)


def parity(name: str, device: str, hidden: int = 48) -> Iterator[str]:
    """Proves a cell in every runtime and yields a line for each.

    Raises:
        ParityError: it differs from float64 by more than float32 allows.
    """
    from unroll_export.parity.gate import prove
    from unroll_proto import bundle

    kinds = {file: kind for kind, file in bundle.FILES.items()}
    model = network(name, hidden, layers=2)
    for file, opened in runtimes(device)[0].items():
        content = artifact(model, file)
        (proof,) = prove(model, {kinds[file]: content}, runtimes={kinds[file]: {device: opened}}).proofs
        differing, values = differing_bits(opened(content), model)
        same = "the same bits" if not differing else f"{differing} of {values} values differ in their bits"
        yield f"{name}, {file}: {proof.worst_ratio:.2f} of what float32 allows; in other company {same}"


def differing_bits(runtime: "Runtime", model: "RecurrentClassifier[Any]", lanes: int = 64) -> tuple[int, int]:
    """Counts values whose bits depend on the other lanes of a tick of one shape, and all values."""
    import numpy as np

    from unroll_engine.runtimes.base import on_host

    rng = np.random.default_rng(0)
    tensors = 2 if model.architecture == "simple_lstm" else 1
    x = rng.standard_normal((16, lanes, FEATURES), np.float32)
    shape = (tensors, model.rnn.num_layers, lanes, model.rnn.hidden_size)
    state = rng.uniform(-1, 1, shape).astype(np.float32)
    order = rng.permutation(lanes)
    alone, moved = (on_host(runtime.run(x[:, lane], tuple(state[:, :, lane]))) for lane in (slice(None), order))
    pairs = [(alone.states[:, order], moved.states), (alone.logits[:, order], moved.logits)]
    differing = sum(int((one.copy().view("u4") != two.copy().view("u4")).sum()) for one, two in pairs)
    return differing, sum(one.size for one, _ in pairs)


def served(model: "RecurrentClassifier[Any]", device: str, lanes: int) -> "Model":
    """Makes the model that the engine runs by TorchScript."""
    from unroll_engine.models.calibration import tick_cost
    from unroll_engine.models.loader import Model
    from unroll_engine.models.spec import ModelKey, ModelSpec

    rnn, runtime = model.rnn, runtimes(device)[0]["model.ts"](artifact(model, "model.ts"))
    names = tuple(str(index) for index in range(max(FEATURES, CLASSES)))
    spec = ModelSpec(
        key=ModelKey("gpu", 1),
        architecture=model.architecture,
        input_size=FEATURES,
        hidden_size=rnn.hidden_size,
        output_size=CLASSES,
        num_layers=rnn.num_layers,
        class_labels=names[:CLASSES],
        feature_names=names[:FEATURES],
    )
    cost = tick_cost(runtime, spec, lanes)
    return Model(spec, runtime, bitwise=False, max_abs_diff=0.0, test_accuracy=None, cost=cost)


def rate(name: str, device: str, hidden: int, lanes: int, rounds: int) -> Rate:
    """Measures eager PyTorch with its inputs on the device, and Engine from arrays to classes, in turns."""
    import numpy as np
    import torch

    from unroll_engine import Engine, Ragged

    model = network(name, hidden, layers=1)
    engine = Engine(served(model, device, lanes), max_lanes=lanes)
    sequences = np.random.default_rng(0).standard_normal((lanes, STEPS, FEATURES), np.float32)
    ragged = Ragged(sequences.reshape(lanes * STEPS, FEATURES), np.full(lanes, STEPS))
    eager, inputs = model.to(device), torch.from_numpy(sequences).to(device)

    def run_eager() -> None:
        with torch.inference_mode():
            eager.unroll(inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    calls: list[Callable[[], object]] = [run_eager, lambda: engine.classify(ragged)]
    seconds: list[list[float]] = [[], []]
    for number in range(rounds + 2):
        for call, taken in zip(calls, seconds, strict=True):
            begin = time.perf_counter()
            call()
            if number > 1:  # the first ones warm up
                taken.append(time.perf_counter() - begin)
    return Rate(*(lanes * STEPS / median(taken) for taken in seconds))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the results line by line; returns the exit code, 1 if a cell computes wrong results."""
    parser = argparse.ArgumentParser(prog="unroll_bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--cells", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--hidden", nargs="*", type=int, default=list(HIDDEN))
    parser.add_argument("--lanes", nargs="*", type=int, default=list(LANES))
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    if reason := reason_to_skip(options.device):
        print(f"gpu: skipped: {reason}")
        return 0
    from unroll_export.parity.runners import ParityError

    if left_out := runtimes(options.device)[1]:
        print(left_out)
    failed = False
    for name in options.cells:
        try:
            for line in parity(name, options.device):
                print(line, flush=True)
        except ParityError as error:
            failed = True
            print(f"{name}: {error}", flush=True)
    for name in options.cells:
        for hidden in options.hidden:
            for lanes in options.lanes:
                eager, engine = rate(name, options.device, hidden, lanes, options.rounds)
                met = "met" if engine >= BAR * eager else f"not met, the bar is {BAR:.0%}"
                sizes = f"{name}, hidden {hidden}, {lanes} lanes"
                print(f"{sizes}: engine {engine:,.0f} steps/s, {engine / eager:.0%} of eager: {met}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
