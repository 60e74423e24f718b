"""What a user can choose of a load."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

DEFAULT_IN_FLIGHT: Final = 64
DEFAULT_LENGTHS: Final = "5..120"


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of `unroll bench`, None where one was not given.

    Attributes:
        model: Name; empty where only one is served.
        model_version: Its version; None is the newest.
        closed: Requests to keep in flight.
        open: Requests a second.
        sequences: Sequences to keep open on streams.
        streams: Calls that carry them.
        cadence: Seconds between the chunks of a sequence.
        chunk: Timesteps of a chunk.
        every: Of streams, every which step is reported.
        lengths: As `parse_lengths` reads.
        file: Of sequences to send.
        batch: Sequences of a request.
        connections: TCP connections.
        seconds: To measure.
        warm_up: Seconds before that.
        seed: Of all that is random.

    Raises:
        ValueError: options that don't go together.
    """

    model: str
    model_version: int | None
    closed: int | None
    open: float | None
    sequences: int | None
    streams: int | None
    cadence: float | None
    chunk: int
    every: int
    lengths: str | None
    file: Path | None
    batch: int
    connections: int
    seconds: float
    warm_up: float
    seed: int

    def __post_init__(self) -> None:
        kinds = {
            "--closed": self.closed,
            "--open": self.open,
            "--sequences, --streams or --cadence": self.sequences or self.streams or self.cadence,
        }
        if len(given := [name for name, value in kinds.items() if value]) > 1:
            raise ValueError(f"{' and '.join(given)}: one kind of load at a time")
        if self.lengths and self.file:
            raise ValueError("--lengths and --file: one of them")
        if self.mode == "streams" and (self.lengths or self.batch > 1):
            raise ValueError("--lengths and --batch: for requests only; streams have --chunk")
        if self.mode != "streams" and (self.chunk > 1 or self.every > 1):
            raise ValueError("--chunk and --every: for streams only; requests have --lengths")
        if self.sequences and self.streams and self.sequences < self.streams:
            raise ValueError(f"--sequences: {self.sequences}, for {self.streams} streams as many or more expected")

    @property
    def mode(self) -> str:
        """What kind of load it is: "closed", "open" or "streams"."""
        if self.sequences or self.streams or self.cadence:
            return "streams"
        return "open" if self.open else "closed"

    @property
    def scheduled(self) -> bool:
        """Whether calls have a moment at which they should begin, whatever the answers do."""
        return self.open is not None or self.cadence is not None

    def plain(self) -> dict[str, Any]:
        """All of them, ready for JSON."""
        return asdict(self) | {"file": self.file and str(self.file)}
