"""Uncopied: what holds connections, and so can neither be pickled nor copied."""

from typing import NoReturn


class Uncopied:
    """A base that refuses `pickle` and `copy` with the way out, which `_instead` names."""

    _instead = "make a client in each process that needs one; snapshots can be sent"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds connections and can't be pickled or copied: {self._instead}")
