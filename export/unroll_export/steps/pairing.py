"""Finds the state tensors of a graph: pairs of an input and the output that is its next value."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from unroll_export.steps.reading import Value
from unroll_export.weight_files import ImportRefusedError

_WORDS = "next new prev previous past present in out input output inputs outputs old cur current cached n"
_MARKS = frozenset(_WORDS.split())
"""Words of a name that only distinguish before from after."""
_RECURRENT = re.compile(r"(h|c|hx|cx|hidden|cell|state)(0|n)")
"""Names like h0 and hn."""


class Pair(NamedTuple):
    """A tensor of the state.

    Attributes:
        before: Input with its value.
        after: Output with its next value.
        reason: Reason for the pair.
    """

    before: Value
    after: Value
    reason: str


def find_pairs(inputs: Sequence[Value], outputs: Sequence[Value], given: Mapping[str, str] | None = None) -> list[Pair]:
    """Pairs inputs with outputs as given, or by their names; never by their shapes alone.

    Args:
        inputs: Inputs of the graph.
        outputs: Outputs of the graph.
        given: Output by input, from the caller; if not empty, there are no other pairs.

    Raises:
        ImportRefusedError: a given pair does not fit.
    """
    by_name = {value.name: value for value in inputs}
    after = {value.name: value for value in outputs}
    pairs = []
    for before_name, after_name in (given or {}).items():
        for name, known, what in ((before_name, by_name, "input"), (after_name, after, "output")):
            if name not in known:
                raise ImportRefusedError(f"--state: no {what} is named {name!r}; there are {', '.join(known)}")
        pair = Pair(by_name.pop(before_name), after.pop(after_name), "given")
        if not compatible(pair.before, pair.after):
            raise ImportRefusedError(f"--state: {pair.before} and {pair.after} don't fit each other")
        pairs.append(pair)
    if pairs:
        return pairs
    stems = [stem_of(value.name) for value in inputs]
    for value, stem in zip(inputs, stems, strict=True):
        found = [other for other in outputs if stem_of(other.name) == stem and compatible(value, other)]
        # Names without a letter mean nothing.
        if len(found) == 1 and stems.count(stem) == 1 and re.search("[a-z]", stem):
            pairs.append(Pair(value, found[0], "by their names"))
    return pairs


def compatible(before: Value, after: Value) -> bool:
    """Returns True if an output can be the next value of an input, by dtype and shape."""
    if before.dtype != after.dtype:
        return False
    if before.dims is None or after.dims is None:
        return True
    sizes = zip(before.dims, after.dims, strict=False)
    return len(before.dims) == len(after.dims) > 0 and all(
        one == other or isinstance(one, str) or isinstance(other, str) for one, other in sizes
    )


def stem_of(name: str) -> str:
    """Returns a name without the words that distinguish before from after.

    `prev_state` and `next_state`, `stateN` and `state`, `h0` and `hn`, `cache_in` and `cache_out` have one stem.
    """
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name).lower().replace("key_values", "")
    parts = [part for part in re.split(r"[^a-z0-9]+", words) if part]
    kept = [match[1] if (match := _RECURRENT.fullmatch(part)) else part for part in parts if part not in _MARKS]
    if len(kept) > 1 and kept[-1] in ("0", "n") and _RECURRENT.fullmatch(f"{kept[-2]}0"):
        kept.pop()
    return " ".join(kept)
