"""Every runtime in a real server: the answers are eager PyTorch's, in batches and in streams."""

from pathlib import Path

import grpc.aio
import numpy as np
import pytest
import torch
from support import wire
from support.eager import TOLERANCE
from support.processes import ServerProcess, run

from unroll_engine.kernel import unavailable_reason
from unroll_export.runs import TrainedRun, load_run
from unroll_proto.sequences import Sequence
from unroll_proto.v1 import unroll_pb2 as pb

RUNTIMES = [
    pytest.param("kernel", "cpu", id="kernel-cpu"),
    pytest.param("onnx", "cpu", id="onnx-cpu"),
    pytest.param("torchscript", "cpu", id="torchscript-cpu"),
    pytest.param("onnx", "cuda", id="onnx-cuda", marks=pytest.mark.gpu),
    pytest.param("torchscript", "cuda", id="torchscript-cuda", marks=pytest.mark.gpu),
]


def skip_without(runtime: str, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    if runtime == "kernel" and unavailable_reason():
        pytest.skip(f"kernel: {unavailable_reason()}")
    if (runtime, device) == ("onnx", "cuda"):
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("onnxruntime-gpu is not installed")


@pytest.mark.parametrize(("runtime", "device"), RUNTIMES)
async def test_labels_logits_and_states_are_eager_s(
    bundle_root: Path,
    trained_run: TrainedRun,
    vowels: list[Sequence],
    tmp_path: Path,
    runtime: str,
    device: str,
) -> None:
    skip_without(runtime, device)
    with ServerProcess(bundle_root, tmp_path / "log", "--runtime", runtime, "--device", device) as process:
        await compare(process, "jv", trained_run, [sequence.values for sequence in vowels])
        assert process.stop() == 0


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that differs from the default in all respects: binary, two layers, one feature, a custom file."""
    folder = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 12, 80)
    labels = np.arange(80) % 2
    values = np.concatenate([rng.normal(label, 1, (length, 1)) for label, length in zip(labels, lengths, strict=True)])
    np.savez(folder / "data.npz", values=values.astype(np.float32), lengths=lengths, labels=labels)
    options = ["--hidden-size", "5", "--layers", "2", "--epochs", "3"]
    run("unroll-train", "--data", folder / "data.npz", "--out", folder / "run", *options)
    return folder / "run"


@pytest.mark.parametrize(("runtime", "device"), RUNTIMES)
async def test_a_binary_model_of_two_layers_is_served_as_well(
    odd_run: Path, tmp_path: Path, runtime: str, device: str
) -> None:
    skip_without(runtime, device)
    run("unroll-export", odd_run, "--out", tmp_path / "models" / "odd")
    rng = np.random.default_rng(1)
    sequences = [rng.normal(size=(length, 1)).astype(np.float32) for length in (1, 2, 3, 40, 7, 16, 17)]
    with ServerProcess(tmp_path / "models", tmp_path / "log", "--runtime", runtime, "--device", device) as process:
        await compare(process, "odd", load_run(odd_run), sequences)
        assert process.stop() == 0


async def compare(process: ServerProcess, name: str, trained: TrainedRun, sequences: list[wire.Array]) -> None:
    """Classifies and streams the sequences, resumes their final states, and compares all with eager PyTorch."""
    network = trained.model
    outputs, hidden = network.fc.out_features, network.rnn.hidden_size
    async with grpc.aio.insecure_channel(process.address) as channel:
        stub = wire.stub_of(channel)
        answer = await stub.Classify(wire.classify_request(sequences, name, return_final_states=True))
        again = await stub.Classify(wire.classify_request(sequences, name, initial_states=answer.final_states))
        for index, values in enumerate(sequences):
            with torch.inference_mode():
                logits, states, final = network.unroll(torch.from_numpy(values)[None])
                later, _, _ = network.unroll(torch.from_numpy(values)[None], final)
            expected = logits[0, -1].numpy()
            got = wire.to_array(answer.logits, outputs)[index]
            assert np.abs(got - expected).max() <= TOLERANCE
            assert np.abs(wire.to_array(again.logits, outputs)[index] - later[0, -1].numpy()).max() <= TOLERANCE
            probable = int(expected[0] > 0) if outputs == 1 else int(expected.argmax())
            assert answer.labels[index] == trained.class_labels[probable]
            kept = wire.to_array(answer.final_states[index].state[0], hidden)
            assert np.abs(kept - final[:, 0].numpy()).max() <= TOLERANCE
            if index < 20:
                streamed = await stream(stub, name, values)
                assert np.abs(wire.to_array(streamed.states, hidden) - states[0].numpy()).max() <= TOLERANCE
                assert np.abs(wire.to_array(streamed.logits, outputs) - logits[0].numpy()).max() <= TOLERANCE


async def stream(stub: object, name: str, values: wire.Array) -> pb.Steps:
    """Streams a sequence in chunks of 1, 2, 3, ... steps; returns the joined answers."""
    requests, begin, size = [wire.open_request("a", name)], 0, 1
    while begin < len(values):
        requests.append(wire.chunk_request("a", begin, values[begin : begin + size]))
        begin, size = begin + size, size + 1
    parts = wire.steps_of(await wire.exchange(stub, requests), "a")
    states = b"".join(part.states for part in parts)
    return pb.Steps(count=len(values), states=states, logits=b"".join(part.logits for part in parts))
