"""What the repository's index tells of a version."""

from enum import StrEnum
from typing import NamedTuple


class VersionState(StrEnum):
    """How a version stands."""

    READY = "READY"
    """It takes new work."""
    LOADING = "LOADING"
    """It is being verified, loaded and warmed up."""
    LEAVING = "LEAVING"
    """It takes no new work, and goes when the sequences that began on it have ended."""
    REFUSED = "REFUSED"
    """What lies in the repository can't be trusted or run."""


class IndexEntry(NamedTuple):
    """A version in the repository's index.

    Attributes:
        name: The model's name.
        version: The version.
        state: How it stands.
        reason: Why it is refused; of a version that is READY, why what has taken its place on disk is.
    """

    name: str
    version: int
    state: VersionState
    reason: str
