"""The core: a removed model is released after its last job, even if others are busy."""

import time

import numpy as np
from support.counting import Counting
from support.models import alone, random_network, served

from unroll_engine.core import EngineCore
from unroll_engine.jobs import BatchJob
from unroll_engine.models.loader import Model

LEAVING = served(random_network(), "leaving")
BUSY = served(random_network(), "busy")


def batch(model: Model, sequences: int, steps: int) -> BatchJob:
    values = np.zeros((sequences * steps, model.spec.input_size), np.float32)
    return BatchJob(model, values, np.arange(sequences + 1) * steps)


async def test_a_model_that_leaves_does_not_wait_for_the_others_to_rest() -> None:
    metrics = Counting()
    core = EngineCore([LEAVING, BUSY], 2, 5, metrics)

    last, endless = batch(LEAVING, 3, 7), batch(BUSY, 100, 50)
    core.add(last, time.monotonic())
    core.add(endless, time.monotonic())
    core.remove_model(LEAVING)
    answered: list[object] = []
    while last not in answered:
        assert metrics.loaded == 2
        assert core.prepare(time.monotonic()) is not None
        core.run()
        answered += [job for job, _ in core.events()]
    assert core.prepare(time.monotonic()) is not None
    assert endless not in answered
    assert metrics.loaded == 1


async def test_a_cancelled_job_frees_its_places_in_mid_flight_and_no_other_s() -> None:
    model = served(random_network(), "shared")
    core = EngineCore([model], 8, 5, Counting())
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3 * 40, model.spec.input_size), dtype=np.float32)
    leaving, staying = (BatchJob(model, values, np.arange(4) * 40) for _ in range(2))
    for job in (leaving, staying):
        core.add(job, time.monotonic())
    assert core.prepare(time.monotonic()) is not None
    core.run()
    leaving.cancelled = True
    core.cancel(leaving)
    answered: list[object] = []
    while core.prepare(time.monotonic()) is not None:
        core.run()
        answered += [job for job, _ in core.events()]
    assert answered == [staying]
    assert core.idle
    for index in range(3):
        logits, _, _ = alone(model, values[40 * index : 40 * index + 40], None)
        assert staying.logits[index].tobytes() == logits[-1].tobytes()


async def test_a_lone_short_sequence_runs_past_the_queue_and_others_do_not() -> None:
    model = served(random_network(), "single")
    core = EngineCore([model], 8, 5, Counting())
    now = time.monotonic()
    expired = batch(model, 1, 5)
    expired.deadline = now
    for job in (expired, batch(model, 2, 5), batch(model, 1, 10**4)):
        assert core.plan_single(job, now) is None
    assert core.idle

    lone = batch(model, 1, 5)
    assert core.plan_single(lone, now) is not None
    assert core.plan_single(batch(model, 1, 5), now) is None
    core.run()
    assert [job for job, _ in core.events()] == [lone]
    assert lone.logits[0].tobytes() == alone(model, lone.values, None)[0][-1].tobytes()

    core.add(batch(model, 1, 5), now)
    assert core.plan_single(batch(model, 1, 5), now) is None


async def test_an_engine_is_idle_again_once_what_was_queued_is_dropped() -> None:
    model = served(random_network(), "dropped")
    core = EngineCore([model], 8, 5, Counting())
    late = batch(model, 1, 5)
    late.deadline = 0.0
    core.add(late, time.monotonic())
    assert not core.idle
    assert core.prepare(time.monotonic()) is None
    assert core.idle
