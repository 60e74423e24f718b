"""The Scan form against the RNN operator and against the bare matrix product."""

from bench.figures import Figure, Outcome, Verdict, ratios
from bench.inside.arithmetic import OPERATOR, PRODUCT, SCAN, SHAPES, STEPS, Shape, times
from bench.rows.row import Row
from bench.session import Session


async def _measure(session: Session, outcome: Outcome, shape: Shape) -> dict[str, list[float]]:
    taken = await session.inside(times, shape)
    for name, seconds in taken.items():
        outcome.figures.append(Figure(name, f"us for {STEPS} steps, {shape}", [second * 1e6 for second in seconds]))
    return taken


async def scan(session: Session, outcome: Outcome) -> None:
    """At every number of lanes; the bar is at 64."""
    for shape in (shape for shape in SHAPES if shape.hidden == 128):
        taken = await _measure(session, outcome, shape)
        if shape.lanes == 64:
            outcome.verdicts.append(Verdict("RNN operator's time / Scan's", ratios(taken[OPERATOR], taken[SCAN]), 5))


async def product(session: Session, outcome: Outcome) -> None:
    """The share of the product's rate is the product's time by Scan's."""
    for shape in (shape for shape in SHAPES if shape.hidden == 512):
        taken = await _measure(session, outcome, shape)
        share = ratios(taken[PRODUCT], taken[SCAN])
        outcome.verdicts.append(Verdict("product's time / Scan's", share, 0.75, unit="%"))


SCAN_ROW = Row("scan", "Scan form against the RNN operator, 64 lanes x 16 steps, hidden 128", scan)
PRODUCT_ROW = Row("product", "Scan form, share of the bare product's rate, hidden 512, 64 lanes", product)
