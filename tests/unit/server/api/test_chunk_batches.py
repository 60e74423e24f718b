"""Chunks of many sequences in one message have the results of separate messages."""

import asyncio
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import wire
from support.models import random_classifier, served
from support.streams import streamed
from support.values import random_values

from unroll_engine.runtimes.onnx import OnnxCpuRuntime
from unroll_export.graphs.onnx_rnn import build_onnx_rnn
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server.config import Limits

FEATURES = 3
LIMITS = Limits(max_sequences=6, max_steps=40, max_open_sequences=8, max_message_bytes=2**20)
_lstm, _other = random_classifier("lstm", layers=2), random_classifier("gru", seed=1)
MODELS = {
    "kernel": [served(_lstm), served(_other, "other")],
    "onnx": [
        served(each, name, runtime=OnnxCpuRuntime(build_onnx_rnn(each)))
        for each, name in ((_lstm, "m"), (_other, "other"))
    ],
}
RESOURCE_EXHAUSTED = 8
KEYS = ["a", "b", "c", "d"]

_faults = st.sampled_from(["gap", "again", "not finite", "cut", "empty", "too long", "other values"])
_chunks = st.tuples(st.sampled_from([*KEYS, "never opened"]), st.integers(1, 20), st.none() | st.none() | _faults)
_openings = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["m", "other"]),
        "return_states": st.booleans(),
        "return_logits": st.booleans(),
        "every": st.integers(0, 4),
    }
)


def chunk_of(
    rng: np.random.Generator, step: int, count: int, fault: str | None, before: list[tuple[int, bytes]]
) -> tuple[int, bytes, int]:
    """First step and values of the next chunk of a sequence, or of one `before`, and the steps that it consumes."""
    if fault == "again" and before:
        return *before[count % len(before)], 0
    values = rng.standard_normal((count, FEATURES)).astype(np.float32)
    if fault == "gap":
        return step + 1, wire.to_bytes(values), 0
    if fault == "other values" and step:
        return 0, wire.to_bytes(values), 0
    if fault == "not finite":
        values[count // 2, 1] = np.nan
        return step, wire.to_bytes(values), 0
    if fault == "cut":
        return step, wire.to_bytes(values)[:-1], 0
    if fault == "empty":
        return step, b"", 0
    if fault == "too long":
        return step, wire.to_bytes(np.zeros((LIMITS.max_steps + 1, FEATURES))), 0
    return step, wire.to_bytes(values), count


def outcomes(responses: list[pb.UnrollResponse]) -> dict[str, list[Any]]:
    """Returns the answers by key, in order; answers to consecutive steps are joined."""
    found: dict[str, list[Any]] = {}
    for response in responses:
        event = response.WhichOneof("event")
        if event == "steps_batch":
            batch = response.steps_batch
            answers = [
                (key, pb.UnrollResponse(steps=pb.Steps(first_step=first, count=count, states=states, logits=logits)))
                for key, first, count, states, logits in zip(
                    batch.keys, batch.first_steps, batch.counts, batch.states, batch.logits, strict=True
                )
            ]
        else:
            answers = [(response.key, response)]
        for key, answer in answers:
            said = found.setdefault(key, [])
            if answer.HasField("steps") and said and isinstance(said[-1], pb.Steps):
                last = said[-1]
                if last.first_step + last.count == answer.steps.first_step:
                    last.count += answer.steps.count
                    last.states += answer.steps.states
                    last.logits += answer.steps.logits
                    continue
            said.append(answer.steps if answer.HasField("steps") else getattr(answer, str(answer.WhichOneof("event"))))
    return found


@pytest.mark.parametrize("runtime", MODELS)
@settings(max_examples=60)
@given(
    openings=st.tuples(*[_openings] * len(KEYS)),
    messages=st.lists(st.lists(_chunks, min_size=1, max_size=8), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_many_keys_in_one_message_are_answered_as_one_key_a_message(
    runtime: str, openings: tuple[dict[str, Any], ...], messages: list[list[tuple[str, int, str | None]]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    opened = [wire.open_request(key, **options) for key, options in zip(KEYS, openings, strict=True)]
    ends = [request for key in KEYS for request in (wire.snapshot_request(key), wire.close_request(key))]
    singly, together = [*opened], [*opened]
    steps = dict.fromkeys([*KEYS, "never opened"], 0)
    sent: dict[str, list[tuple[int, bytes]]] = {key: [] for key in steps}
    for message in messages:
        batch = pb.ChunkBatch()
        for key, count, fault in message:
            first_step, values, consumed = chunk_of(rng, steps[key], count, fault, sent[key])
            steps[key] += consumed
            if consumed:
                sent[key].append((first_step, values))
            singly.append(pb.UnrollRequest(key=key, chunk=pb.Chunk(first_step=first_step, values=values)))
            batch.keys.append(key)
            batch.first_steps.append(first_step)
            batch.values.append(values)
        together.append(pb.UnrollRequest(chunks=batch))
    one_key, many_keys = [
        outcomes(asyncio.run(streamed(MODELS[runtime], LIMITS, [*requests, *ends]))) for requests in (singly, together)
    ]
    assert many_keys == one_key
    assert {key: one_key[key][-1].snapshot.step for key in KEYS} == {key: steps[key] for key in KEYS}


def test_the_chunks_of_a_message_are_answered_in_one() -> None:
    """So are those that wait for the ones before them, with other messages behind."""
    values, count = [random_values(2, seed) for seed in range(len(KEYS))], len(KEYS)
    requests = [wire.open_request(key, "m") for key in KEYS]
    requests += [wire.chunks_request(KEYS, [step] * count, values) for step in (0, 2, 4)]
    requests += map(wire.close_request, KEYS)
    responses = asyncio.run(streamed(MODELS["kernel"], LIMITS, requests))
    events = [response.WhichOneof("event") for response in responses]
    assert events == ["opened"] * count + ["steps_batch"] * 3 + ["closed"] * count
    assert responses[0].opened.max_chunks_bytes == LIMITS.max_message_bytes
    assert [list(response.steps_batch.keys) for response in responses[count : count + 3]] == [KEYS] * 3


@pytest.mark.parametrize(
    "batch",
    [
        pb.ChunkBatch(),
        pb.ChunkBatch(keys=["a"], first_steps=[0]),
        pb.ChunkBatch(keys=["a"], values=[b""]),
        pb.ChunkBatch(keys=["a"] * 9, first_steps=[0] * 9, values=[b""] * 9),
    ],
    ids=["empty", "no values", "no first steps", "more than may be open"],
)
def test_a_message_that_is_none_is_refused_whole(batch: pb.ChunkBatch) -> None:
    (response,) = asyncio.run(streamed(MODELS["kernel"], LIMITS, [pb.UnrollRequest(chunks=batch)]))
    assert response.key == ""
    assert response.error.message.startswith("chunks: ")
    assert [field for field, _ in wire.violations_of(response.error)] == ["chunks"]


def test_a_full_queue_refuses_only_the_chunks_that_do_not_fit() -> None:
    """Chunks of another model are queued first."""
    models = dict.fromkeys("ab", "m") | dict.fromkeys("cde", "other")
    requests = [wire.open_request(key, model) for key, model in models.items()]
    requests.append(wire.chunks_request([*models], [0] * 5, np.ones((5, 1, FEATURES), np.float32)))
    answers = outcomes(asyncio.run(streamed(MODELS["kernel"], LIMITS, requests, max_queued_steps=4)))
    refused = [key for key, said in answers.items() if not isinstance(said[-1], pb.Steps)]
    assert refused == ["e"]
    assert answers["e"][-1].code == RESOURCE_EXHAUSTED
