"""The step kernel: recurrent networks in C++, with the same bits on every CPU it runs on. See docs/numerics.md.

`Network` holds packed weights and runs sequences; it may be used by several threads at once. `SequenceQueue` runs
sequences of any lengths side by side, a budget of steps at a time.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unroll_engine.errors import RuntimeUnavailableError
from unroll_engine.kernel.onnx_reader import read_onnx
from unroll_engine.kernel.weights import LayerWeights, NetworkWeights, UnsupportedNetworkError
from unroll_engine.models.spec import Float32Array, State

try:
    from unroll_engine.kernel import _kernel
except ImportError as error:
    _import_error: str | None = str(error)
else:
    _import_error = None

__all__ = [
    "Ended",
    "LayerWeights",
    "Network",
    "NetworkWeights",
    "Outcome",
    "Progress",
    "SequenceQueue",
    "UnsupportedNetworkError",
    "isas",
    "pack",
    "read_onnx",
    "unavailable_reason",
]

SLOTS = 48
"""Sequences that run side by side on one thread: a multiple of the largest tile, few enough for the caches."""


def unavailable_reason() -> str | None:
    """Returns why the kernel can't run here, or None if it can."""
    if _import_error is not None:
        return f"the kernel was not compiled when unroll-engine was installed ({_import_error})"
    if not _kernel.isas():
        return "the kernel needs a CPU with AVX2 and FMA"
    return None


def isas() -> list[str]:
    """Returns this CPU's instruction sets that the kernel is compiled for, the fastest first; [] if unavailable."""
    return [] if _import_error is not None else _kernel.isas()


def pack(arrays: tuple[Any, ...], features: int) -> tuple[Float32Array, NDArray[np.int64]] | None:
    """Concatenates sequences at the speed of memory.

    Args:
        arrays: C-contiguous float32 arrays [steps, features] of finite numbers, 1 step or more each.
        features: Size of a timestep.

    Returns:
        float32 [total_steps, features], and int64 [sequences + 1], the first row of each sequence and the end. None if
        an element is anything else, or the kernel was not compiled.
    """
    return None if unavailable_reason() else _kernel.pack(arrays, features)


_UNBOUNDED = 2**63 - 1


class Outcome(IntEnum):
    """Outcome of a sequence."""

    DONE = 0
    CANCELLED = 1
    EXPIRED = 2


class Ended(NamedTuple):
    """Sequences of a ticket with the same outcome. Their results are written only if they are done."""

    ticket: int
    outcome: Outcome
    sequences: int


class Progress(NamedTuple):
    """Result of one `advance`."""

    steps: int
    """Timesteps computed, over all sequences."""
    ended: list[Ended]


class Network:
    """A network, packed for the kernel.

    Args:
        weights: Weights of the network, float32, C-contiguous; copied.
        isa: One of `isas()`; the fastest if empty. All give the same bits.

    Raises:
        RuntimeUnavailableError: the kernel can't run here.
        ValueError: the shapes of the weights do not fit together.
    """

    def __init__(self, weights: NetworkWeights, isa: str = "") -> None:
        if reason := unavailable_reason():
            raise RuntimeUnavailableError(f"kernel: {reason}")
        self.packed = _kernel.Network(
            weights.cell, weights.scale, weights.layers, weights.readout, weights.readout_bias, isa
        )
        self.isa = self.packed.isa

    def run(self, x: Float32Array, state: State) -> tuple[Float32Array, Float32Array, State]:
        """Computes `steps` timesteps of `lanes` sequences side by side.

        Args:
            x: [steps, lanes, input_size], raw features.
            state: [num_layers, lanes, hidden_size] each.

        Returns:
            Logits [steps, lanes, output_size], states of the last layer [steps, lanes, hidden_size], and the state
            after the last step, as `state`.

        Raises:
            ValueError, TypeError: an array has another shape or dtype. The message names it.
        """
        packed = self.packed
        logits = np.empty((*x.shape[:2], packed.output_size), np.float32)
        states = np.empty((*x.shape[:2], packed.hidden_size), np.float32)
        final = tuple(np.empty_like(tensor) for tensor in state)
        packed.run_lanes(x, state, final, states, logits)
        return logits, states, final

    def run_to_end(self, x: Float32Array, state: State) -> tuple[Float32Array, State]:
        """Computes as `run` does, but returns only the last step's logits, [lanes, output_size], and the state."""
        logits = np.empty((x.shape[1], self.packed.output_size), np.float32)
        final = tuple(np.empty_like(tensor) for tensor in state)
        self.packed.run_lanes(x, state, final, None, logits)
        return logits, final

    def run_one(
        self,
        x: Float32Array,
        state: State | None = None,
        *,
        final_state: State | None = None,
        states: Float32Array | None = None,
        logits: Float32Array | None = None,
    ) -> None:
        """Computes one sequence at the lowest latency. Results are written into the given arrays.

        Args:
            x: [steps, input_size], raw features; rows may be apart.
            state: [num_layers, hidden_size] each; None for zeros.
            final_state: Receives the state after the last step; may be `state` itself.
            states: [steps, hidden_size], receives the last layer's state at every step.
            logits: [output_size] receives the last step's logits, [steps, output_size] those of every step.

        Raises:
            ValueError, TypeError: an array has another shape or dtype. The message names it.
        """
        self.packed.run_one(x, state, final_state, states, logits)


class SequenceQueue:
    """Sequences that wait, and slots that run them: a slot is refilled as soon as its sequence ends.

    Each thread has slots of its own. The threads get equal shares of the sequences, in the order of arrival.

    Args:
        network: Runs the sequences.
        slots: Sequences side by side on one thread, 1 to 4,096.
        threads: Threads that `advance` computes on, the caller's among them; fewer if there is little work.
    """

    def __init__(self, network: Network, slots: int = SLOTS, threads: int = 1) -> None:
        self._queue = _kernel.Queue(network.packed, slots, threads)

    def submit(
        self,
        x: Float32Array,
        state: State | None = None,
        *,
        final_state: State | None = None,
        states: Float32Array | None = None,
        logits: Float32Array | None = None,
        deadline: float | None = None,
    ) -> int:
        """Queues a sequence and returns its ticket. The arrays are kept and must not change until it ends.

        Args:
            x: See Network.run_one, also for the other arrays.
            state: Read when the sequence begins to run.
            final_state: Written when it is done.
            states: Written while it runs.
            logits: Written while it runs.
            deadline: Seconds of `time.monotonic()` at which it ends as expired; None for none.

        Raises:
            ValueError, TypeError: an array has another shape or dtype. The message names it.
        """
        nanoseconds = 0 if deadline is None else max(1, int(deadline * 1e9))
        return self._queue.submit(x, state, final_state, states, logits, nanoseconds)

    def submit_batch(
        self,
        values: Float32Array,
        offsets: Sequence[int],
        first: int,
        state: State | None,
        final_state: State | None,
        logits: Float32Array,
        states: Float32Array | None = None,
    ) -> int:
        """Queues some sequences of a batch under one ticket: `advance` returns how many of them ended.

        Args:
            values: [rows, input_size].
            offsets: First row of each of these sequences, and the end of the last.
            first: Index of the first of them in the batch.
            state: [num_layers, batch, hidden_size] each; None for zeros.
            final_state: Shaped as `state`, receives the states after the last steps.
            logits: [batch, output_size], receives the logits of the last steps; [rows, output_size] with `states`,
                receives the logits of every step.
            states: [rows, hidden_size], receives the last layer's state at every step; needs `final_state`.

        Raises:
            ValueError, TypeError: an array has another shape or dtype. The message names it.
        """
        return self._queue.submit_batch(values, offsets, first, state, final_state, logits, states)

    def cancel(self, ticket: int) -> bool:
        """Makes the next `advance` end a ticket's sequences as cancelled. Returns False if all have ended already."""
        return self._queue.cancel(ticket)

    def advance(self, budget: int, *, rounds: int = _UNBOUNDED) -> Progress:
        """Runs the slots, without the GIL, for `budget` timesteps or until nothing is left.

        The budget counts the steps of every sequence, and is exceeded by less than one step of all slots.

        Args:
            budget: 1 or more.
            rounds: Most steps of one sequence, 1 or more. Sequences in the slots run exactly as many, or to their ends.

        Raises:
            RuntimeError: the last call, on another thread, has not returned.
            ValueError: a number is out of its range.
        """
        steps, ended = self._queue.advance(budget, rounds)
        return Progress(steps, [Ended(ticket, Outcome(outcome), number) for ticket, outcome, number in ended])

    def __len__(self) -> int:
        """Number of sequences that have not ended."""
        return len(self._queue)
