"""The core: a removed model is released after its last job, whatever the others have to do."""

import time

import numpy as np
from support.counting import Counting
from support.models import random_network, served

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
