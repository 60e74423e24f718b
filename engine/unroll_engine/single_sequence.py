"""A sequence that has nothing to be gathered with: run in one tick by itself, past all lanes."""

import numpy as np

from unroll_engine.jobs import BatchJob, ChunkJob, Emit, Job, complete
from unroll_engine.runtimes.base import Runtime

_FIRST = np.zeros(1, np.int64)


def run_alone(job: Job, runtime: Runtime, emit: Emit) -> None:
    """Runs a work of one sequence in one tick."""
    initial = job.initial_state or job.model.spec.zero_state(1)
    logits, states, final = runtime.run(job.values[:, np.newaxis], initial)
    if isinstance(job, ChunkJob):
        emit(job, job.steps_done(logits[:, 0], states[:, 0]))
        emit(job, job.ended(tuple(array[:, 0] for array in final)))
    elif isinstance(job, BatchJob):
        job.lanes_done(_FIRST, logits[-1], final if job.keeps_states else None)
        complete([job])
        emit(job, job)
