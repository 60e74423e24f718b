"""Uncopied: base of classes that hold connections and so can be neither pickled nor copied."""

from typing import NoReturn


class Uncopied:
    """Base that refuses `pickle` and `copy` with a hint, which subclasses set as `_instead`."""

    _instead = "make a client in each process that needs one; snapshots can be sent"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds connections and can't be pickled or copied: {self._instead}")
