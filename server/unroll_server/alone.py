"""A sequence that has nothing to be gathered with: run in one tick by itself, past all lanes."""

import numpy as np

from unroll_server.runtimes.base import Runtime
from unroll_server.work import Batch, Emit, Stretch, Work, complete

_FIRST = np.zeros(1, np.int64)


def run_alone(work: Work, runtime: Runtime, emit: Emit) -> None:
    """Runs a work of one sequence in one tick."""
    initial = work.initial_state or work.model.spec.zero_state(1)
    logits, states, final = runtime.run(work.values[:, np.newaxis], initial)
    if isinstance(work, Stretch):
        emit(work, work.steps_done(logits[:, 0], states[:, 0]))
        emit(work, work.ended(tuple(array[:, 0] for array in final)))
    elif isinstance(work, Batch):
        work.lanes_done(_FIRST, logits[-1], final if work.keeps_states else None)
        complete([work])
        emit(work, work)
