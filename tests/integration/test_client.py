"""The client library against real server processes: eager PyTorch's results, and drains without losses."""

import asyncio
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.eager import TOLERANCE
from support.processes import ServerProcess

from unroll_client import (
    AsyncClient,
    AsyncSequence,
    Client,
    FailedPrecondition,
    InvalidArgument,
    ServerDraining,
    Snapshot,
    Unavailable,
)
from unroll_export.runs import TrainedRun
from unroll_proto.sequences import Sequence

Float32Array = NDArray[np.float32]


def eager(run: TrainedRun, values: Float32Array) -> tuple[Float32Array, Float32Array]:
    """Computes logits [steps, classes] and states [steps, hidden] of one sequence by eager PyTorch."""
    with torch.inference_mode():
        logits, states, _ = run.model.unroll(torch.from_numpy(values)[None])
    return logits[0].numpy(), states[0].numpy()


def states_of(steps: Any) -> Float32Array:
    assert steps.states is not None
    states: Float32Array = steps.states
    return states


def test_labels_are_eager_s_on_the_whole_test_split(
    server: ServerProcess, vowels: list[Sequence], trained_run: TrainedRun
) -> None:
    with Client(server.address) as client:
        result = client.classify([sequence.values for sequence in vowels])
    assert len(result) == len(vowels) == 370
    for index, sequence in enumerate(vowels):
        logits, _ = eager(trained_run, sequence.values)
        assert result.labels[index] == trained_run.class_labels[int(logits[-1].argmax())]
        np.testing.assert_allclose(result.logits[index], logits[-1], rtol=0, atol=TOLERANCE)
    probabilities = torch.softmax(torch.from_numpy(result.logits), dim=1).numpy()
    np.testing.assert_allclose(result.probabilities, probabilities, rtol=0, atol=1e-6)


def test_states_are_eager_s_step_by_step(
    server: ServerProcess, vowels: list[Sequence], trained_run: TrainedRun
) -> None:
    values = vowels[3].values
    logits, states = eager(trained_run, values)
    with Client(server.address, model="jv") as client, client.unroll(logits=True) as sequence:
        for step in range(len(values)):
            answer = sequence.send(values[step : step + 1])
            assert answer.steps.tolist() == [step]
            assert answer.logits is not None
            np.testing.assert_allclose(states_of(answer)[0], states[step], rtol=0, atol=TOLERANCE)
            np.testing.assert_allclose(answer.logits[0], logits[step], rtol=0, atol=TOLERANCE)


def test_what_the_model_is(server: ServerProcess, trained_run: TrainedRun) -> None:
    with Client(server.address) as client:
        (model,) = client.models()
        assert client.model() == client.model("jv", 1) == model
    assert (model.name, model.version, model.input_size) == ("jv", 1, 12)
    assert model.class_labels == trained_run.class_labels
    assert 0 < model.max_abs_diff <= TOLERANCE
    assert model.bitwise
    assert model.test_accuracy is not None


async def test_a_drained_server_s_sequences_go_on_elsewhere(
    server: ServerProcess, bundle_root: Path, tmp_path: Path, vowels: list[Sequence]
) -> None:
    values = np.concatenate([sequence.values for sequence in vowels[:20]])
    async with AsyncClient(server.address) as elsewhere:
        async with elsewhere.unroll() as undisturbed:
            expected = states_of(await undisturbed.send(values))
        with ServerProcess(bundle_root, tmp_path / "log") as leaving:
            async with AsyncClient(leaving.address, reconnect_timeout=0) as client:
                sequences = [await client.unroll().open() for _ in range(10)]
                running = [asyncio.create_task(until_drained(sequence, values)) for sequence in sequences]
                leaving.signal(signal.SIGTERM)
                ended = await asyncio.gather(*running)
            assert leaving.wait() == 0, leaving.log
        for got, snapshot in ended:
            assert len(got) == snapshot.step
            async with elsewhere.unroll(snapshot=snapshot) as sequence:
                rest = states_of(await sequence.send(values[snapshot.step :]))
            assert np.concatenate([got, rest]).tobytes() == expected.tobytes()


async def until_drained(sequence: AsyncSequence, values: Float32Array) -> tuple[Float32Array, Snapshot]:
    """Sends step by step until the server drains; returns the states until then, and the snapshot."""
    got = [np.empty((0, 128), np.float32)]
    for step in range(len(values) - 1):
        try:
            got.append(states_of(await sequence.send(values[step : step + 1])))
        except ServerDraining as end:
            return np.concatenate(got), end.snapshot
    raise AssertionError("the values ran out before the server was drained")


async def test_a_killed_server_s_sequences_go_on_from_a_snapshot_that_was_kept(
    server: ServerProcess, bundle_root: Path, tmp_path: Path, vowels: list[Sequence]
) -> None:
    values = vowels[0].values
    async with AsyncClient(server.address) as elsewhere:
        async with elsewhere.unroll() as undisturbed:
            expected = states_of(await undisturbed.send(values))
        with ServerProcess(bundle_root, tmp_path / "log") as victim:
            async with AsyncClient(victim.address, reconnect_timeout=0) as client, client.unroll() as sequence:
                got = states_of(await sequence.send(values[:5]))
                (await sequence.snapshot()).save(tmp_path / "state")
                victim.signal(signal.SIGKILL)
                with pytest.raises(Unavailable):
                    await send_for_ever(sequence, values[5:6])
                assert victim.wait() == -signal.SIGKILL
        async with elsewhere.unroll(snapshot=Snapshot.load(tmp_path / "state")) as sequence:
            rest = states_of(await sequence.send(values[5:]))
    assert np.concatenate([got, rest]).tobytes() == expected.tobytes()


async def send_for_ever(sequence: AsyncSequence, values: Float32Array) -> None:
    while True:
        await sequence.send(values)


def test_a_bad_call_beside_good_ones(server: ServerProcess, vowels: list[Sequence]) -> None:
    sequences = [sequence.values for sequence in vowels[:50]]
    with Client(server.address) as client, ThreadPoolExecutor(8) as pool:
        alone = client.classify(sequences)
        good = [pool.submit(client.classify, sequences) for _ in range(8)]
        for bad in (np.ones((5, 11)), np.full((5, 12), np.inf)):
            with pytest.raises(InvalidArgument) as caught:
                client.classify([*sequences, bad])
            assert caught.value.fields
        for future in good:
            assert future.result().logits.tobytes() == alone.logits.tobytes()


async def test_callers_that_share_requests_get_what_each_would_alone(
    server: ServerProcess, vowels: list[Sequence]
) -> None:
    async with AsyncClient(server.address, coalesce=False) as client:
        expected = await client.classify([sequence.values for sequence in vowels])
    bad = Snapshot("nosuch", 1, "simple_rnn", 0, (bytes(512),))
    async with AsyncClient(server.address) as client:
        results = await asyncio.gather(
            *(client.classify([sequence.values]) for sequence in vowels),
            *(
                client.classify([sequence.values], initial_states=[bad if index == 7 else None])
                for index, sequence in enumerate(vowels)
            ),
            return_exceptions=True,
        )
    refused = results.pop(len(vowels) + 7)
    assert isinstance(refused, FailedPrecondition)
    assert [field.field for field in refused.fields] == ["initial_states[0]"]
    indices = [*range(len(vowels)), *(index for index in range(len(vowels)) if index != 7)]
    for index, result in zip(indices, results, strict=True):
        assert not isinstance(result, BaseException)
        assert result.labels == [expected.labels[index]]
        assert result.logits.tobytes() == expected.logits[index].tobytes()
        assert result.probabilities.tobytes() == expected.probabilities[index].tobytes()


def test_one_client_is_balanced_over_all_replicas(
    server: ServerProcess, bundle_root: Path, tmp_path: Path, vowels: list[Sequence]
) -> None:
    sequences = [sequence.values for sequence in vowels[:10]]
    with ServerProcess(bundle_root, tmp_path / "log") as other:
        target = f"ipv4:{server.address},{other.address}"
        with Client(target) as client:
            expected = client.classify(sequences)
            for _ in range(5):
                assert client.classify(sequences).logits.tobytes() == expected.logits.tobytes()
            before = other.cpu_seconds()
            while other.cpu_seconds() == before:
                client.classify(sequences * 20)
            # With one of the two stopped, calls go to the other, without an error.
            other.signal(signal.SIGKILL)
            other.wait()
            for _ in range(20):
                assert client.classify(sequences).logits.tobytes() == expected.logits.tobytes()
