"""Exemplars: the last traced value of each bucket of a histogram, and its trace.

An exemplar is 6 words: the time in seconds since 1970, float64; the value, float64; the ids of trace and span, 24
bytes; the time again. It is written from the last word to the first, and read from the first to the last, maybe by
another process: it is whole if both times are equal.
"""

import struct
import time

import numpy as np
from prometheus_client.samples import Exemplar

from unroll_engine.observer import Trace
from unroll_server.telemetry.metrics.memory import Figures, Memory

_WORDS = 6
_CONTENT = struct.Struct("=d16s8s")
_TRACE_BYTES = 16
_SUFFIX = "-exemplar"


class Exemplars:
    """The exemplars of some numbers, one for each; they take memory from the first traced value on.

    Args:
        memory: The memory of the numbers.
        kind: Kind of the numbers.
        name: Name of what they count.
        size: Number of them.
    """

    __slots__ = ("_label", "_memory", "_words")

    def __init__(self, memory: Memory, kind: str, name: str, size: int) -> None:
        self._memory = memory
        self._label = kind + _SUFFIX, name, size * _WORDS
        self._words: memoryview[float] | None = None

    def keep(self, place: int, value: float, trace: Trace) -> None:
        """Replaces the exemplar of the number at `place`."""
        if self._words is None:
            self._words = self._memory.of(*self._label)
        words = self._words[place * _WORDS : (place + 1) * _WORDS]
        words[_WORDS - 1] = now = time.time()
        _CONTENT.pack_into(words.cast("B"), 8, value, trace.ids[:_TRACE_BYTES], trace.ids[_TRACE_BYTES:])
        words[0] = now


def latest(memory: Memory, kind: str, size: int) -> dict[str, dict[int, Exemplar]]:
    """Returns the exemplars of a kind over all processes, by name and the place of their number."""
    newest: dict[str, Figures] = {}
    for _, name, figures in memory.of_kind(kind + _SUFFIX, size * _WORDS):
        words = figures.reshape(size, _WORDS)
        words[words[:, 0] != words[:, -1]] = 0.0
        kept = newest.setdefault(name, words)
        later = words[:, 0] > kept[:, 0]
        kept[later] = words[later]
    return {
        name: {place: _exemplar(words[place]) for place in np.flatnonzero(words[:, 0]).tolist()}
        for name, words in newest.items()
    }


def _exemplar(words: Figures) -> Exemplar:
    value, trace, span = _CONTENT.unpack_from(words.tobytes(), 8)
    return Exemplar({"trace_id": trace.hex(), "span_id": span.hex()}, value, float(words[0]))
