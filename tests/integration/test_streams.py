"""Streams over a real socket: the same bits however a sequence is sent, and errors that harm no other."""

import asyncio
from itertools import repeat
from typing import Any

import grpc
import grpc.aio
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support import wire
from support.eager import TOLERANCE, eager
from support.processes import ServerProcess

from unroll_export.runs import TrainedRun
from unroll_proto.sequences import Sequence
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceStub


@settings(max_examples=25)
@given(data=st.data())
def test_the_same_bits_alone_batched_chunked_streamed_and_resumed(
    server: ServerProcess, vowels: list[Sequence], data: st.DataObject
) -> None:
    picked = data.draw(st.lists(st.integers(0, len(vowels) - 1), min_size=1, max_size=20))
    sequences = [vowels[index].values for index in picked]
    cuts = [
        sorted(data.draw(st.sets(st.integers(1, len(values) - 1), max_size=4))) if len(values) > 1 else []
        for values in sequences[:4]
    ]

    async def compare() -> None:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = wire.stub_of(channel)
            batched = await stub.Classify(wire.classify_request(sequences, return_final_states=True))
            singles = await asyncio.gather(
                *(stub.Classify(wire.classify_request([values], return_final_states=True)) for values in sequences)
            )
            assert b"".join(single.logits for single in singles) == batched.logits
            assert b"".join(single.probabilities for single in singles) == batched.probabilities
            assert [single.final_states[0] for single in singles] == list(batched.final_states)
            # Streams: all keys on one call, chunks interleaved; each is resumed from its snapshot at a new key.
            whole = [wire.open_request(f"whole {index}") for index in range(len(cuts))]
            whole += [wire.chunk_request(f"whole {index}", 0, sequences[index]) for index in range(len(cuts))]
            undisturbed = await wire.exchange(stub, whole)
            for index, positions in enumerate(cuts):
                await resume(stub, sequences[index], positions, wire.steps_of(undisturbed, f"whole {index}"))
                last = wire.steps_of(undisturbed, f"whole {index}")[-1]
                assert last.logits[-36:] == singles[index].logits

    async def resume(stub: UnrollServiceStub, values: wire.Array, positions: list[int], whole: list[pb.Steps]) -> None:
        opening: dict[str, Any] = {}
        states, logits = b"", b""
        for begin, end in zip([0, *positions], [*positions, len(values)], strict=True):
            responses = await wire.exchange(
                stub,
                [
                    wire.open_request("part", **opening),
                    wire.chunk_request("part", begin, values[begin:end]),
                    wire.snapshot_request("part"),
                ],
            )
            states += b"".join(part.states for part in wire.steps_of(responses, "part"))
            logits += b"".join(part.logits for part in wire.steps_of(responses, "part"))
            opening["initial_state"] = responses[-1].snapshot
            assert opening["initial_state"].step == end
        assert states == b"".join(part.states for part in whole)
        assert logits == b"".join(part.logits for part in whole)

    asyncio.run(compare())


async def test_streamed_states_are_eager_s_and_name_their_steps(
    stub: UnrollServiceStub, trained_run: TrainedRun, vowels: list[Sequence]
) -> None:
    values = np.concatenate([vowels[0].values, vowels[1].values])
    requests = [wire.open_request("a", every=3), wire.chunk_request("a", 0, values[:20])]
    requests += [wire.chunk_request("a", 20, values[20:]), wire.close_request("a")]
    responses = await wire.exchange(stub, requests)
    opened = responses[0].opened
    assert (opened.model, opened.version, opened.step) == ("jv", 1, 0)
    assert opened.bundle == responses[-1].closed.snapshot.bundle != b""
    parts = wire.steps_of(responses, "a")
    step = 0
    for part in parts:
        assert part.first_step == step
        step += part.count
    assert step == len(values)
    _, states = eager(trained_run, values)
    streamed = np.concatenate([wire.to_array(part.states, 128) for part in parts])
    assert np.abs(streamed - states[2::3]).max() <= TOLERANCE
    assert responses[-1].closed.reason == pb.SequenceClosed.REASON_CLOSED
    assert responses[-1].closed.snapshot.step == len(values)


async def test_many_keys_in_one_message_have_the_bits_of_one_key_a_message(
    stub: UnrollServiceStub, vowels: list[Sequence]
) -> None:
    """Its answer is larger than an HTTP/2 window; the other stream sends one key per message."""
    keys, steps = [str(index) for index in range(500)], 8
    values = [vowels[index % len(vowels)].values[:7].repeat(3, axis=0)[:steps] for index in range(len(keys))]
    opened = [wire.open_request(key) for key in keys]
    batched, single = await asyncio.gather(
        wire.exchange(stub, [*opened, wire.chunks_request(keys, [0] * len(keys), values)]),
        wire.exchange(
            stub, [*opened, *(wire.chunk_request(*each) for each in zip(keys, repeat(0), values, strict=False))]
        ),
    )
    batches = [response.steps_batch for response in batched if response.HasField("steps_batch")]
    states = {key: state for batch in batches for key, state in zip(batch.keys, batch.states, strict=True)}
    logits = {key: logit for batch in batches for key, logit in zip(batch.keys, batch.logits, strict=True)}
    assert sum(map(len, states.values())) == len(keys) * steps * 4 * 128
    for key in keys:
        (part,) = wire.steps_of(single, key)
        assert (states[key], logits[key]) == (part.states, part.logits)


async def test_a_repeated_chunk_is_answered_the_same_and_applied_once(
    stub: UnrollServiceStub, vowels: list[Sequence]
) -> None:
    values = np.concatenate([sequence.values for sequence in vowels[:3]])
    chunks = [wire.chunk_request("a", begin, values[begin : begin + 5]) for begin in range(0, 25, 5)]
    repeated = [chunks[0], chunks[0], chunks[1], chunks[2], chunks[0], chunks[1], chunks[3], chunks[4], chunks[3]]
    plain = await wire.exchange(stub, [wire.open_request("a"), *chunks, wire.close_request("a")])
    disturbed = await wire.exchange(stub, [wire.open_request("a"), *repeated, wire.close_request("a")])
    answers = {part.first_step: part for part in wire.steps_of(plain, "a")}
    assert [part.first_step for part in wire.steps_of(disturbed, "a")] == [0, 0, 5, 10, 0, 5, 15, 20, 15]
    assert all(part == answers[part.first_step] for part in wire.steps_of(disturbed, "a"))
    assert disturbed[-1] == plain[-1]


async def test_errors_of_a_sequence_travel_in_the_stream_and_harm_no_other(
    stub: UnrollServiceStub, vowels: list[Sequence]
) -> None:
    good = vowels[0].values
    bad = good[:4].copy()
    bad[1, 2] = np.nan
    foreign = pb.Snapshot(format=1, model="jv", version=9, architecture="simple_rnn", state=[bytes(512)])
    responses = await wire.exchange(
        stub,
        [
            wire.open_request("good"),
            wire.chunk_request("good", 0, good[:3]),
            wire.chunk_request("nobody", 0, good),
            wire.open_request("unknown", model="nothing"),
            wire.open_request("foreign", version=1, initial_state=foreign),
            wire.open_request("good"),
            wire.chunk_request("good", 7, good[7:]),
            wire.chunk_request("good", 3, bad),
            wire.chunk_request("good", 0, good[1:4]),
            pb.UnrollRequest(key="good"),
            wire.open_request(""),
            wire.open_request("x" * 129),
            wire.chunk_request("good", 3, good[3:]),
            wire.close_request("good"),
        ],
    )
    errors = [(r.key, r.error.code, wire.violations_of(r.error)[0][0]) for r in responses if r.HasField("error")]
    precondition, invalid = grpc.StatusCode.FAILED_PRECONDITION.value[0], grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert [error for error in errors if error[0] == "good"] == [
        ("good", precondition, "key"),
        ("good", precondition, "chunk.first_step"),
        ("good", invalid, "chunk.values"),
        ("good", precondition, "chunk.first_step"),
        ("good", invalid, "action"),
    ]
    assert sorted(error for error in errors if error[0] != "good") == [
        ("", invalid, "key"),
        ("foreign", precondition, "open.initial_state"),
        ("nobody", precondition, "key"),
        ("unknown", grpc.StatusCode.NOT_FOUND.value[0], "open.model"),
        ("x" * 129, invalid, "key"),
    ]
    plain = await wire.exchange(stub, [wire.open_request("good"), wire.chunk_request("good", 0, good)])
    disturbed = b"".join(part.states for part in wire.steps_of(responses, "good"))
    assert disturbed == b"".join(part.states for part in wire.steps_of(plain, "good"))
    assert responses[-1].closed.snapshot.step == len(good)
