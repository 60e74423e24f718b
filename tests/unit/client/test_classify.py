"""classify: one result for any limits and splits, and errors that name the sequence."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.models import alone, random_network, served
from support.servicers import PartialServicer, zero_answer
from unit.client.harness import BINARY, LIMITS, MODEL, STEEP, TWO_LAYERS, LocalServer

from unroll_client import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    Snapshot,
    Unavailable,
)
from unroll_engine.models.loader import Model
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceServicer, UnrollServiceStub

MODELS = {"m": MODEL, "deep": TWO_LAYERS, "binary": BINARY}


def random_sequences(lengths: list[int], seed: int = 0, features: int = 3) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(length, features)).astype(np.float32) for length in lengths]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(1, LIMITS.max_steps) | st.integers(LIMITS.max_steps, 4 * LIMITS.max_steps), max_size=40),
    st.sampled_from(sorted(MODELS)),
)
async def test_however_it_is_split_the_bits_are_those_of_each_alone(
    address: str, lengths: list[int], name: str
) -> None:
    sequences = random_sequences(lengths)
    model = MODELS[name]
    async with AsyncClient(address, model=name) as client:
        result = await client.classify(sequences, return_final_states=True)
    assert (result.model, result.version, len(result)) == (name, 1, len(lengths))
    assert result.probabilities.shape == (len(lengths), len(model.spec.class_labels))
    assert result.logits.shape == (len(lengths), model.spec.output_size)
    assert result.final_states is not None
    assert len(result.final_states) == len(lengths)
    for index, sequence in enumerate(sequences):
        logits, _, (final,) = alone(model, sequence, None)
        assert result.logits[index].tobytes() == logits[-1].tobytes()
        snapshot = result.final_states[index]
        assert (snapshot.model, snapshot.version, snapshot.step) == (name, 1, len(sequence))
        assert snapshot.state[0].shape == final.shape
        assert snapshot.state[0].tobytes() == final.tobytes()
        assert result.labels[index] == model.spec.class_labels[result.label_indices[index]]
        assert result.probabilities[index].argmax() == result.label_indices[index]
    np.testing.assert_allclose(result.probabilities.sum(axis=1), 1, atol=1e-6)


async def test_sequences_go_on_from_their_states(address: str) -> None:
    whole = random_sequences([20, 3 * LIMITS.max_steps, 20] * 4)
    async with AsyncClient(address, model="deep") as client:
        expected = await client.classify(whole, return_final_states=True)
        begun = await client.classify([sequence[:7] for sequence in whole[::2]], return_final_states=True)
        assert begun.final_states is not None
        states = [state for begun_state in begun.final_states for state in (begun_state, None)]
        rest = [sequence[7:] if index % 2 == 0 else sequence for index, sequence in enumerate(whole)]
        result = await client.classify(rest, initial_states=states, return_final_states=True)
        assert result.logits.tobytes() == expected.logits.tobytes()
        assert result.final_states == expected.final_states
        with pytest.raises(InvalidArgument, match="initial_states: 1 states for 12 sequences"):
            await client.classify(whole, initial_states=[None])
        with pytest.raises(FailedPrecondition, match="deep/1"):
            await client.classify(whole[:1], model="m", initial_states=states[:1])


@pytest.mark.parametrize("coalesce", [True, False])
async def test_states_have_their_shape_after_a_new_version_too(
    start: Callable[..., LocalServer], coalesce: bool
) -> None:
    first = start(TWO_LAYERS)
    async with AsyncClient(first.address, wait_for_ready=True, coalesce=coalesce) as client:
        await client.classify(random_sequences([3]))
        first.stop()
        newer = served(random_network(layers=2, seed=1), "deep", 2)
        second = start(TWO_LAYERS, newer, port=first.port)
        for _ in range(3):
            (values,) = random_sequences([3])
            result = await client.classify([values], return_final_states=True)
            assert (result.version, second.calls["GetModel"] <= 2) == (2, True)
            assert result.final_states is not None
            assert result.final_states[0].state[0].tobytes() == alone(newer, values, None)[2][0].tobytes()
            assert result.final_states[0].state[0].shape == (2, 8)


async def test_without_final_states_there_are_none(address: str) -> None:
    async with AsyncClient(address) as client:
        assert (await client.classify(random_sequences([3]), model="m")).final_states is None


def test_over_the_size_of_a_message(start: Callable[..., LocalServer]) -> None:
    wide = served(random_network(features=100), "wide")
    huge = served(random_network(features=1000), "huge")
    (values,) = random_sequences([50], features=100)
    with Client(start(wide, huge).address, model="wide") as client:
        result = client.classify([values[:8], values, values[:9]])
        for index, steps in enumerate((8, 50, 9)):
            assert result.logits[index].tobytes() == alone(wide, values[:steps], None)[0][-1].tobytes()
        with pytest.raises(InvalidArgument, match=r"^sequences\[0\]: a step and the state take .* messages of 4096$"):
            client.classify([np.ones((8, 1100))], model="huge")


@pytest.mark.parametrize("coalesce", [True, False])
async def test_an_error_names_the_sequence_that_went_in_pieces(
    start: Callable[..., LocalServer], coalesce: bool
) -> None:
    lengths = [5, LIMITS.max_steps + 1, 3 * LIMITS.max_steps, 3 * LIMITS.max_steps, 7]
    states = [None, None, Snapshot("m", 9, "simple_rnn", 3, (bytes(32),)), None, None]
    async with AsyncClient(start(STEEP).address, model="m", coalesce=coalesce) as client:
        for step in (3, LIMITS.max_steps + 3, 3 * LIMITS.max_steps - 1):
            sequences = random_sequences(lengths)
            sequences[3][step:] = 3e38
            for given in (sequences, [*random_sequences([9] * 20), *sequences]):
                with pytest.raises(InvalidArgument, match="so large that the state of m/1 is not finite") as caught:
                    await client.classify(given)
                (field,) = caught.value.fields
                assert field.field == f"sequences[{len(given) - 2}]"
        with pytest.raises(FailedPrecondition) as refused:
            await client.classify(random_sequences(lengths), initial_states=states)
        assert [field.field for field in refused.value.fields] == ["initial_states[2]"]


@pytest.mark.parametrize("coalesce", [True, False])
async def test_an_overflow_names_the_sequence(start: Callable[..., LocalServer], coalesce: bool) -> None:
    sequences = [*random_sequences([3]), np.full((2, 3), 3e38)]
    async with AsyncClient(start(STEEP).address, model="m", coalesce=coalesce) as client:
        with pytest.raises(InvalidArgument, match=r"^sequences\[1\]: values are so large"):
            await client.classify(sequences)


@pytest.mark.parametrize(
    "rest", [None, {"first_step": 0}, {"first_step": 0, "end": True, "return_snapshot": True, "logits": True}]
)
async def test_a_session_s_chunk_over_the_limits(address: str, rest: dict[str, Any] | None) -> None:
    (values,) = random_sequences([3 * LIMITS.max_steps + 5])
    logits, states, (final,) = alone(TWO_LAYERS, values, None)
    async with AsyncClient(address, model="deep") as client:
        begun = await client.advance(f"long {rest}", values, start=True, **(rest or {}))
        assert (begun.first_step, begun.count, begun.step) == (0, len(values), len(values))
        assert begun.states is not None
        assert begun.states.tobytes() == states.tobytes()
        expected = await client.classify([values])
        assert begun.probabilities.tobytes() == expected.probabilities.tobytes()
        assert begun.label == expected.labels[0]
        if rest and rest.get("end"):
            assert begun.logits is not None
            assert begun.logits.tobytes() == logits.tobytes()
            assert begun.snapshot is not None
            assert (begun.snapshot.step, begun.snapshot.data) == (len(values), (final.tobytes(),))
            with pytest.raises(NotFound):
                await client.advance(f"long {rest}", values[:1], first_step=len(values))
            return
        assert begun.snapshot is None
        more = await client.advance(f"long {rest}", values, first_step=begun.step if rest else None)
        assert (more.first_step, more.step, more.logits) == (len(values), 2 * len(values), None)
        assert more.states is not None
        _, twice, _ = alone(TWO_LAYERS, np.concatenate([values, values]), None)
        assert more.states.tobytes() == twice[len(values) :].tobytes()


async def test_a_session_s_chunk_that_fails_in_between_says_how_far_it_got(start: Callable[..., LocalServer]) -> None:
    (values,) = random_sequences([3 * LIMITS.max_steps])
    expected = alone(STEEP, values, None)[1]
    bad = values.copy()
    bad[2 * LIMITS.max_steps + 7] = 3e38
    async with AsyncClient(start(STEEP).address, model="m") as client:
        with pytest.raises(InvalidArgument, match="so large") as caught:
            await client.advance("fails", bad, start=True)
        got = caught.value.advanced
        assert got is not None
        assert (got.first_step, got.count, got.step) == (0, 2 * LIMITS.max_steps, 2 * LIMITS.max_steps)
        rest = await client.advance("fails", values[got.step :], first_step=got.step)
        assert got.states is not None
        assert rest.states is not None
        assert got.states.tobytes() + rest.states.tobytes() == expected.tobytes()
        with pytest.raises(InvalidArgument) as at_once:
            await client.advance("fails", np.full((2, 3), 3e38))
        assert at_once.value.advanced is None


async def test_errors_of_the_server_keep_their_fields(address: str) -> None:
    async with AsyncClient(address) as client:
        with pytest.raises(NotFound, match="choose from: binary, deep, m") as unknown:
            await client.classify(random_sequences([3]), model="nosuch")
        assert [field.field for field in unknown.value.fields] == ["model"]
        with pytest.raises(NotFound) as version:
            await client.classify(random_sequences([3]), model="m", version=9)
        assert [field.field for field in version.value.fields] == ["version"]
        with pytest.raises(InvalidArgument) as ambiguous:
            await client.classify(random_sequences([3]))
        assert [field.field for field in ambiguous.value.fields] == ["model"]


@pytest.mark.parametrize("coalesce", [True, False])
async def test_features_that_the_model_does_not_have(address: str, coalesce: bool) -> None:
    async with AsyncClient(address, coalesce=coalesce) as client:
        for count in (1, 3 * LIMITS.max_sequences):
            with pytest.raises(InvalidArgument, match=r"^sequences\[0\]: 4 features, model m has 3$") as caught:
                await client.classify([np.ones((3, 4))] * count, model="m")
            assert [field.field for field in caught.value.fields] == ["sequences[0]"]


async def test_an_error_of_a_part_names_the_sequence_of_the_call(address: str) -> None:
    sequences = random_sequences([5] * (3 * LIMITS.max_sequences))
    async with AsyncClient(address, coalesce=False) as client:
        begun = await client.classify(sequences[:1], model="m", return_final_states=True)
        assert begun.final_states is not None
        (good,) = begun.final_states
        for wrong, error in (
            (replace(good, model="deep"), FailedPrecondition),
            (replace(good, data=(good.data[0][:-4],)), InvalidArgument),
        ):
            states: list[Snapshot | None] = [good] * len(sequences)
            states[19] = wrong
            with pytest.raises(error, match=r"^initial_states\[19\]") as caught:
                await client.classify(sequences, model="m", initial_states=states)
            assert caught.value.fields[0].field.startswith("initial_states[19]")
            assert caught.value.message == str(caught.value)


async def test_numbers_that_the_wire_cannot_carry(address: str) -> None:
    sequences = random_sequences([3])
    async with AsyncClient(address, model="m") as client:
        for wrong in (-1, 1 << 64):
            with pytest.raises(InvalidArgument, match=rf"^version: {wrong}, 0 to 4294967295 expected"):
                await client.classify(sequences, version=wrong)
            with pytest.raises(InvalidArgument, match=r"^version: "):
                await client.model("m", wrong)
            with pytest.raises(InvalidArgument, match=r"^version: "):
                client.unroll(version=wrong)
            with pytest.raises(InvalidArgument, match=r"^every: "):
                client.unroll(every=wrong)
            with pytest.raises(InvalidArgument, match=r"^version: "):
                await client.advance("s", sequences[0], start=True, version=wrong)
            with pytest.raises(InvalidArgument, match=r"^first_step: ") as caught:
                await client.advance("s", sequences[0], first_step=wrong)
            assert [field.field for field in caught.value.fields] == ["first_step"]


async def test_no_server() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(Unavailable):
            await client.models()


def test_the_only_model_needs_no_name(start: Callable[..., LocalServer]) -> None:
    with Client(start(MODEL).address) as client:
        assert client.classify(random_sequences([4])).model == "m"
        assert client.model().name == "m"
        assert client.classify([]).probabilities.shape == (0, 4)


def test_a_server_that_comes_back_is_found(start: Callable[..., LocalServer]) -> None:
    first = start(MODEL)
    with Client(first.address, wait_for_ready=True) as client:
        before = client.classify(random_sequences([4, 5]))
        first.stop()
        start(MODEL, port=first.port)
        after = client.classify(random_sequences([4, 5]))
    assert after.logits.tobytes() == before.logits.tobytes()


async def test_a_full_server_is_asked_again_when_it_says(start: Callable[..., LocalServer]) -> None:
    server = start(MODEL, queued=300)
    async with AsyncClient(server.address) as client:
        # There is room for one of the 4 calls of 240 steps at a time.
        results = await asyncio.gather(*(client.classify(random_sequences([60] * 4)) for _ in range(4)))
    assert len({result.logits.tobytes() for result in results}) == 1


class Scripted(PartialServicer):
    """Answers zeros, from the next version of `versions`; never once they are used up."""

    def __init__(self, versions: list[int], spoil: Callable[[pb.ClassifyResponse], None] | None = None) -> None:
        self.versions = versions
        self.asked: list[tuple[int, int]] = []
        self.spoil = spoil
        self.reached = threading.Event()

    async def Classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:  # noqa: N802
        count = len(request.lengths)
        self.asked.append((request.version, count))
        self.reached.set()
        if not self.versions and not request.version:
            await asyncio.Event().wait()
        version = request.version or self.versions.pop(0)
        answer = zero_answer([f"v{version}"] * count, version=version)
        if self.spoil:
            self.spoil(answer)
        return answer

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
        limits = pb.Limits(max_sequences=2, max_steps=10, max_message_bytes=10_000)
        model = pb.Model(name="m", version=1, input_size=3, output_size=2, class_labels=["a", "b"], limits=limits)
        return pb.GetModelResponse(model=model)


async def test_one_version_answers_all_parts(script: Callable[[UnrollServiceServicer], str]) -> None:
    servicer = Scripted(versions=[1, 2, 1])
    async with AsyncClient(script(servicer)) as client:
        result = await client.classify(random_sequences([2] * 5))
    assert result.version == 2
    assert result.labels == ["v2"] * 5
    assert sorted(version for version, _ in servicer.asked) == [0, 0, 0, 2, 2]


class Losing(Scripted):
    """Forwards calls of sessions to a server, and loses every second answer."""

    def __init__(self, address: str) -> None:
        super().__init__(versions=[])
        self._address = address
        self.calls = 0

    async def Advance(self, request: pb.AdvanceRequest, context: Any) -> pb.AdvanceResponse:  # noqa: N802
        async with grpc.aio.insecure_channel(self._address) as channel:
            answer: pb.AdvanceResponse = await UnrollServiceStub(channel).Advance(request)
        self.calls += 1
        if self.calls % 2:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "lost")
        return answer

    async def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802
        async with grpc.aio.insecure_channel(self._address) as channel:
            return await UnrollServiceStub(channel).ListModels(request)


@pytest.mark.parametrize("first_step", [None, 0])
async def test_each_piece_of_a_session_s_chunk_is_applied_once(
    address: str, script: Callable[[UnrollServiceServicer], str], first_step: int | None
) -> None:
    (values,) = random_sequences([3 * LIMITS.max_steps + 5])
    expected = alone(MODEL, values, None)[1]
    servicer = Losing(address)
    async with AsyncClient(script(servicer), model="m") as client:
        result = await client.advance("once", values, start=True, first_step=first_step)
        assert (result.count, result.step, servicer.calls) == (len(values), len(values), 8)
        assert result.states is not None
        assert result.states.tobytes() == expected.tobytes()
        # The first piece may have been applied, so none follows it.
        with pytest.raises(Unavailable, match="lost") as caught:
            await client.advance("once", values)
        assert caught.value.advanced is None
        assert servicer.calls == 9


class Leaving(Scripted):
    """Unloads version 1 once it has answered a piece."""

    async def Classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:  # noqa: N802
        if request.version == 1:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no version 1 of 'm'")
        answer = await super().Classify(request, context)
        state = pb.Snapshot(format=1, model="m", version=answer.version, architecture="simple_rnn", state=[bytes(8)])
        answer.final_states.extend([state] * len(request.lengths))
        return answer


async def test_a_sequence_in_pieces_begins_anew_where_its_version_is_gone(
    script: Callable[[UnrollServiceServicer], str],
) -> None:
    servicer = Leaving(versions=[1, 2])
    async with AsyncClient(script(servicer)) as client:
        result = await client.classify(random_sequences([25]))
        assert (result.version, result.labels) == (2, ["v2"])
        assert [version for version, _ in servicer.asked] == [0, 0, 2, 2]
        servicer.versions += [1, 1, 1]
        with pytest.raises(NotFound, match="no version 1"):
            await client.classify(random_sequences([25]))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda answer: setattr(answer, "logits", b"123"),
        lambda answer: setattr(answer, "probabilities", b""),
        lambda answer: answer.labels.append("x"),
        lambda answer: answer.label_indices.pop(),
    ],
)
async def test_an_answer_that_cannot_be_is_internal(
    script: Callable[[UnrollServiceServicer], str], spoil: Callable[[pb.ClassifyResponse], None]
) -> None:
    async with AsyncClient(script(Scripted(versions=[1], spoil=spoil))) as client:
        with pytest.raises(Internal):
            await client.classify(random_sequences([2]))


async def test_a_timeout_is_for_the_whole_call(script: Callable[[UnrollServiceServicer], str]) -> None:
    async with AsyncClient(script(Scripted(versions=[]))) as client:
        with pytest.raises(DeadlineExceeded):
            await client.classify(random_sequences([2] * 6), timeout=0.2)


async def test_a_timeout_longer_than_grpc_can_count(address: str) -> None:
    async with AsyncClient(address, model="m", timeout=1e12) as client:
        for count in (1, 3 * LIMITS.max_sequences):
            assert len(await client.classify(random_sequences([3] * count))) == count
        async with client.unroll() as sequence:
            assert (await sequence.send(random_sequences([3])[0])).count == 3


def test_a_client_belongs_to_one_event_loop(address: str) -> None:
    client = AsyncClient(address, model="m")
    sequences = random_sequences([3])

    async def call_and_close() -> None:
        await client.classify(sequences)
        for call in (client.classify(sequences), client.model(), client.advance("s", sequences[0], start=True)):
            await asyncio.to_thread(fails_elsewhere, call)
        await asyncio.to_thread(fails_elsewhere, client.unroll().open())
        await client.close()

    def fails_elsewhere(call: Coroutine[Any, Any, object]) -> None:
        with pytest.raises(RuntimeError, match="the client belongs to another event loop"):
            asyncio.run(call)

    asyncio.run(call_and_close())


async def test_closing_ends_what_waits(script: Callable[[UnrollServiceServicer], str]) -> None:
    servicer = Scripted(versions=[])
    client = AsyncClient(script(servicer))
    waiting = asyncio.create_task(client.classify(random_sequences([2])))
    await asyncio.to_thread(servicer.reached.wait)
    await client.close()
    with pytest.raises(Unavailable, match="the client was closed"):
        await waiting
    with pytest.raises(RuntimeError, match="the client is closed"):
        await client.models()


async def test_cancelling_a_call_is_no_error_of_ours(script: Callable[[UnrollServiceServicer], str]) -> None:
    servicer = Scripted(versions=[])
    async with AsyncClient(script(servicer)) as client:
        waiting = asyncio.create_task(client.classify(random_sequences([2])))
        await asyncio.to_thread(servicer.reached.wait)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


def test_models_are_described(address: str) -> None:
    with Client(address) as client:
        models = client.models()
        assert [model.name for model in models] == ["binary", "deep", "m"]
        assert models[1] == client.model("deep") == client.model("deep", 1)
    described: Model = TWO_LAYERS
    deep = models[1]
    assert (deep.input_size, deep.hidden_size, deep.output_size, deep.num_layers) == (3, 8, 4, 2)
    assert deep.class_labels == described.spec.class_labels
    assert deep.limits.max_sequences == LIMITS.max_sequences
    assert deep.test_accuracy is None


async def test_token_and_metadata_go_with_every_call(script: Callable[[UnrollServiceServicer], str]) -> None:
    seen: list[dict[str, str]] = []

    class Watching(Scripted):
        async def Classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:  # noqa: N802
            seen.append(dict(context.invocation_metadata()))
            return await super().Classify(request, context)

        async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
            seen.append(dict(context.invocation_metadata()))
            return await super().GetModel(request, context)

    address = script(Watching(versions=[1]))
    async with AsyncClient(address, token="secret", metadata=[("x-request-id", "7")]) as client:  # noqa: S106 (a test's)
        await client.classify(random_sequences([2]))
    assert len(seen) == 2
    for metadata in seen:
        assert metadata["authorization"] == "Bearer secret"
        assert metadata["x-request-id"] == "7"


@pytest.mark.parametrize("metadata", [("X-Request-Id", "7"), ("", "7"), ("x-id", "seven\n"), ("x-id", "\u00fc")])
def test_metadata_that_cannot_be_sent(metadata: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r"^metadata: ") as caught:
        AsyncClient("127.0.0.1:1", metadata=[metadata])
    assert "seven" not in str(caught.value)
