"""The sequences of one model that are in flight: one lane each, state rows in a dense prefix of one array."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from unroll_server.models import Model
from unroll_server.runtimes.base import TickResult
from unroll_server.types import Float32Array, State
from unroll_server.work import Work

Emit = Callable[[Work, object], None]
"""Takes something that a work has to deliver."""


@dataclass(eq=False, slots=True)
class Lane:
    """One sequence in flight: `index` of `work`, with the rows of `work.values` from `position` to `end` to run."""

    work: Work
    index: int
    position: int
    end: int


class Lanes:
    """The lanes of one model.

    Lane i of a tick is `lanes[i]`, its state column i of the state arrays. A lane that leaves gives its place to the
    last one, so that the columns in use stay a prefix and no tick has to gather states.

    Args:
        model: What runs them.
        max_lanes: The most at a time.
        max_steps: The most timesteps of a tick.
    """

    def __init__(self, model: Model, max_lanes: int, max_steps: int) -> None:
        self.model = model
        self.lanes: list[Lane] = []
        self._max_lanes = max_lanes
        self._state = model.spec.zero_state(max_lanes)
        self._input = np.zeros(max_steps * max_lanes * model.spec.input_size, np.float32)

    @property
    def free(self) -> int:
        """Lanes that are free."""
        return self._max_lanes - len(self.lanes)

    def join(self, work: Work, index: int) -> None:
        """Puts sequence `index` of `work` into a free lane."""
        column = len(self.lanes)
        self.lanes.append(Lane(work, index, int(work.offsets[index]), int(work.offsets[index + 1])))
        initial = work.initial_states[index]
        for number, array in enumerate(self._state):
            array[:, column] = 0 if initial is None else initial[number]

    def drop_cancelled(self) -> None:
        """Frees the lanes whose caller has left."""
        for column in reversed(range(len(self.lanes))):
            if self.lanes[column].work.cancelled:
                self._leave(column)

    def clear(self) -> list[Work]:
        """Frees every lane and returns the works that had one."""
        works = list({lane.work: None for lane in self.lanes})
        self.lanes.clear()
        return works

    def gather(self, steps: int) -> tuple[Float32Array, State]:
        """The input of a tick: the next `steps` timesteps of every lane, zeros after a lane's end, and the states."""
        count, features = len(self.lanes), self.model.spec.input_size
        x = self._input[: steps * count * features].reshape(steps, count, features)
        for column, lane in enumerate(self.lanes):
            rows = lane.work.values[lane.position : min(lane.position + steps, lane.end)]
            x[: len(rows), column] = rows
            x[len(rows) :, column] = 0
        return x, tuple(np.ascontiguousarray(array[:, :count]) for array in self._state)

    def scatter(self, steps: int, result: TickResult, emit: Emit) -> None:
        """Takes the result of a tick: reports it, moves every lane on, and frees those at their end."""
        count = len(self.lanes)
        for array, final in zip(self._state, result.final_state, strict=True):
            array[:, :count] = final
        for column in reversed(range(count)):
            lane = self.lanes[column]
            ran = min(steps, lane.end - lane.position)
            if lane.work.interactive:
                begin = lane.position - int(lane.work.offsets[lane.index])
                event = lane.work.steps_done(begin, result.logits[:ran, column], result.states[:ran, column])
                if event is not None:
                    emit(lane.work, event)
            lane.position += ran
            if lane.position == lane.end:
                state = self._end_state(lane, column, ran, steps, result)
                event = lane.work.lane_done(lane.index, result.logits[ran - 1, column], state)
                if event is not None:
                    emit(lane.work, event)
                self._leave(column)

    def _end_state(self, lane: Lane, column: int, ran: int, steps: int, result: TickResult) -> State | None:
        if not lane.work.keeps_states:
            return None
        if ran < steps:
            # The tick ran past this lane's end, which it may do only where the layer's states are the whole state.
            return (result.states[ran - 1, column][np.newaxis].copy(),)
        return tuple(array[:, column].copy() for array in self._state)

    def _leave(self, column: int) -> None:
        last = self.lanes.pop()
        if column < len(self.lanes):
            self.lanes[column] = last
            for array in self._state:
                array[:, column] = array[:, len(self.lanes)]
