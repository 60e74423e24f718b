"""Results: samples with their spread, figures of contestants, claims and their bars."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """Median and quartiles of the repeats of one measurement."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Computes the spread of one sample or more."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(middle, low, high)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Divides round by round, so that what else the machine did in a round hits both sides of a ratio."""
    return [mine / other if other else math.inf if mine else 1.0 for mine, other in zip(ours, theirs, strict=True)]


@dataclass(frozen=True)
class Figure:
    """Samples of one contestant.

    Attributes:
        contestant: Its name.
        metric: Name of the quantity, with its unit.
        samples: One per round.
    """

    contestant: str
    metric: str
    samples: Sequence[float]

    @property
    def spread(self) -> Spread:
        """Spread over the rounds."""
        return Spread.of(self.samples)

    def to_json(self) -> dict[str, Any]:
        """Returns the figure for the report's file."""
        return {
            "contestant": self.contestant,
            "metric": self.metric,
            **self.spread._asdict(),
            "samples": list(self.samples),
        }


@dataclass(frozen=True)
class Verdict:
    """A claim of the table, measured.

    Attributes:
        claim: Text of the comparison.
        samples: One per round; empty if it could not be measured.
        bar: Required value.
        at_least: True if the bar is a lower bound, False if it is an upper one.
        unit: "x", "%" (samples are shares of 1), or a unit.
        missing: Reason why there are no samples.
    """

    claim: str
    samples: Sequence[float]
    bar: float
    at_least: bool = True
    unit: str = "x"
    missing: str = ""

    @property
    def spread(self) -> Spread:
        """Spread over the rounds."""
        return Spread.of(self.samples)

    @property
    def met(self) -> bool:
        """True if the median meets the bar; False if there are no samples."""
        if not self.samples:
            return False
        # bool, since the samples may be numpy's.
        return bool(self.spread.median >= self.bar if self.at_least else self.spread.median <= self.bar)

    def show(self, value: float) -> str:
        """Returns a value in the claim's unit."""
        if self.unit == "%":
            return f"{value * 100:.0f} %"
        text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
        return f"{text}{'' if self.unit == 'x' else ' '}{self.unit}"

    @property
    def measured(self) -> str:
        """Returns median and quartiles as text."""
        if not self.samples:
            return "not measured"
        spread = self.spread
        if len(self.samples) == 1:
            return self.show(spread.median)
        return f"{self.show(spread.median)} ({self.show(spread.low)} to {self.show(spread.high)})"

    @property
    def asked(self) -> str:
        """Returns the bar as text."""
        return f"{self.show(self.bar)} or {'more' if self.at_least else 'less'}"

    def to_json(self) -> dict[str, Any]:
        """Returns the verdict for the report's file."""
        return {
            "claim": self.claim,
            "unit": self.unit,
            **(self.spread._asdict() if self.samples else {}),
            "bar": self.bar,
            "at_least": self.at_least,
            "met": self.met,
            "missing": self.missing,
            "samples": list(self.samples),
        }


@dataclass
class Outcome:
    """Results of one row of the table.

    Attributes:
        key: The row's name on the command line.
        what: Text of the row.
        verdicts: Claims of the row.
        figures: Figures that the verdicts are computed from.
        notes: Remarks for the reader.
        problem: Reason why it could not be measured; empty if it was.
        seconds: Duration of the measurement.
    """

    key: str
    what: str
    verdicts: list[Verdict] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problem: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns the outcome for the report's file."""
        return {
            "key": self.key,
            "what": self.what,
            "problem": self.problem,
            "seconds": round(self.seconds, 1),
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "figures": [figure.to_json() for figure in self.figures],
            "notes": self.notes,
        }
