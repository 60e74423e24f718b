"""Nearly valid messages: the bytes of a valid one, changed in places."""

from hypothesis import strategies as st

_EDITS = st.lists(
    st.tuples(st.sampled_from(["flip", "insert", "delete", "repeat"]), st.integers(0, 2**16), st.binary(max_size=9)),
    max_size=6,
)
_WORDS = (
    b"\xff" * 9 + b"\x01",
    b"\x80\x80\x80\x80\x08",
    b"\x7f\xff\xff\xff",
    b"\x00\x00\xc0\x7f",
    b"\xc3\x28",
    b"\x0a",
)
"""A varint of 64 ones, one of 2**31, a large int, float32 NaN, wrong UTF-8, the tag of a first field."""


def mutate(data: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    """Applies edits to data, each at its own place."""
    changed = bytearray(data)
    for kind, where, piece in edits:
        at = where % (len(changed) + 1)
        word = piece or _WORDS[where % len(_WORDS)]
        if kind == "flip" and at < len(changed):
            changed[at] ^= word[0] or 1
        elif kind == "insert":
            changed[at:at] = word
        elif kind == "delete":
            del changed[at : at + len(word)]
        elif kind == "repeat":
            changed[at:at] = changed[max(at - 40, 0) : at]
    return bytes(changed)


def mutated(messages: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Messages with none, some or many of their bytes changed."""
    return st.builds(mutate, messages, _EDITS)
