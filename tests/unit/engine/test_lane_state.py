"""The states of lanes: in arrays or on a device, the engine's results are the same."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.counting import Counting
from support.eager import TOLERANCE
from support.models import random_classifier, served
from support.values import random_values

from unroll_engine import Engine
from unroll_engine.core import EngineCore, deliver
from unroll_engine.jobs import BatchJob, StepsJob
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import State
from unroll_engine.runtimes.base import LaneState, Runtime, TickResult
from unroll_engine.runtimes.lane_arrays import lane_state
from unroll_engine.runtimes.lane_tensors import DeviceValues, LaneTensors
from unroll_engine.runtimes.torchscript import TorchScriptRuntime
from unroll_engine.runtimes.torchscript_cuda import TorchScriptCudaRuntime
from unroll_export.graphs.torchscript import build_torchscript
from unroll_export.model import Cell, RecurrentClassifier


class TensorRuntime(TorchScriptRuntime):
    """Keeps the states of lanes in tensors, as on a card."""

    def lane_state(self, initial: State, lanes: int, rows: int, input_size: int) -> LaneState:
        return LaneTensors(self._compute, self.device, initial, lanes, rows, input_size)

    @torch.inference_mode()
    def _compute(self, values: torch.Tensor, state: Sequence[torch.Tensor]) -> TickResult[DeviceValues]:
        result = self.run(values.numpy(), tuple(tensor.numpy() for tensor in state))
        logits, states, *final = [
            DeviceValues(torch.from_numpy(array)) for array in (result.logits, result.states, *result.final_state)
        ]
        return TickResult(logits, states, tuple(final))


RUNTIMES = [
    pytest.param(TorchScriptRuntime, id="arrays"),
    pytest.param(TensorRuntime, id="tensors"),
    pytest.param(TorchScriptCudaRuntime, id="cuda", marks=pytest.mark.gpu),
]
Open = Callable[[bytes], Runtime]


def opened(runtime: Open, network: RecurrentClassifier[Any]) -> Runtime:
    if runtime is TorchScriptCudaRuntime and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return runtime(build_torchscript(network))


def model_of(runtime: Open, cell: Cell, layers: int) -> tuple[Model, RecurrentClassifier[Any]]:
    network = random_classifier(cell, layers=layers)
    return served(network, runtime=opened(runtime, network)), network


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_states_are_put_moved_run_kept_and_taken(runtime: Open) -> None:
    network = random_classifier("lstm", layers=2)
    model = served(network, runtime=opened(runtime, network))
    rng = np.random.default_rng(0)
    begin = tuple(rng.uniform(-1, 1, (2, 3, 8)).astype(np.float32) for _ in range(2))
    initial = tuple(np.full((2, 1, 8), value, np.float32) for value in (0.25, -0.5))
    lanes = lane_state(model.runtime, initial, 6, 40, 3)

    lanes.put(slice(0, 6), None)
    lanes.put([5, 0, 3], begin)
    lanes.move([5], [1])
    taken = lanes.take(np.array([0, 1, 2, 3]))
    for array, given, first in zip(taken, begin, initial, strict=True):
        assert array.tobytes() == np.stack([given[:, 1], given[:, 0], first[:, 0], given[:, 2]], axis=1).tobytes()

    x = lanes.inputs[:20].reshape(5, 4, 3)
    x[:] = rng.standard_normal(x.shape)
    result = lanes.run(x)
    expected = model.runtime.run(x.copy(), taken)
    assert np.abs(np.asarray(result.logits) - np.asarray(expected.logits)).max() <= TOLERANCE
    for array, before in zip(lanes.take(np.arange(4)), taken, strict=True):
        assert array.tobytes() == before.tobytes()
    lanes.keep(result.final_state)
    for array, final in zip(lanes.take(np.arange(4)), expected.final_state, strict=True):
        assert np.abs(array - np.asarray(final)).max() <= TOLERANCE
    for array, given in zip(lanes.take(np.array([5])), begin, strict=True):
        assert array.tobytes() == np.ascontiguousarray(given[:, :1]).tobytes()


@pytest.mark.parametrize(("cell", "layers"), [("rnn", 1), ("lstm", 2), ("gru", 1)])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_batches_and_streams_of_any_lengths_are_eager_s(runtime: Open, cell: Cell, layers: int) -> None:
    model, network = model_of(runtime, cell, layers)
    sequences = [random_values(steps, seed) for seed, steps in enumerate([7, 1, 300, 45, 2, 64, 130, 13, 90])]
    with Engine(model, max_lanes=4) as engine, torch.inference_mode():
        begun = engine.classify(sequences, return_final_states=True)
        resumed = engine.classify(sequences, initial_states=begun.final_states)
        for index, values in enumerate(sequences):
            logits, states, _ = network.unroll(torch.tensor(np.concatenate([values, values]))[None])
            steps = len(values)
            assert np.abs(begun.logits[index] - logits[0, steps - 1].numpy()).max() <= TOLERANCE
            assert np.abs(resumed.logits[index] - logits[0, -1].numpy()).max() <= TOLERANCE
            stream = engine.open()
            for chunk, end in ((values, steps), (values, 2 * steps)):
                result = stream.advance(chunk)
                assert np.abs(result.logits - logits[0, end - steps : end].numpy()).max() <= TOLERANCE
                assert np.abs(result.states - states[0, end - steps : end].numpy()).max() <= TOLERANCE


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_bulk_and_steps_share_ticks_and_cancelled_lanes_leave_no_trace(runtime: Open) -> None:
    model, network = model_of(runtime, "lstm", 2)
    core = EngineCore([model], 6, 5, Counting())
    values = np.concatenate([random_values(40, seed) for seed in range(3)])
    offsets = np.arange(4) * 40
    leaving, staying = (BatchJob(model, values, offsets, keeps_states=True) for _ in range(2))
    together = StepsJob(model, values, offsets, keeps_states=True)
    for job in (leaving, staying, together):
        core.add(job, time.monotonic())
    assert core.prepare(time.monotonic()) is not None
    core.run()
    leaving.cancelled = True
    core.cancel(leaving)
    while core.prepare(time.monotonic()) is not None:
        core.run()
        deliver(core.events())
    assert staying.over
    assert together.over
    assert not leaving.over
    with torch.inference_mode():
        logits, _, final = network.unroll(torch.tensor(values).view(3, 40, -1))
    assert np.abs(together.logits - logits.flatten(0, 1).numpy()).max() <= TOLERANCE
    assert np.abs(staying.logits - logits[:, -1].numpy()).max() <= TOLERANCE
    for job in (staying, together):
        assert job.final_state is not None
        for array, expected in zip(job.final_state, final, strict=True):
            assert np.abs(array - expected.numpy()).max() <= TOLERANCE
