"""The step kernel by itself: its rate against onnxruntime's operators, the Scan form and torch.mm."""

from bench.figures import Figure, Outcome, Verdict, ratios
from bench.inside.kernel import (
    KERNEL,
    LENGTH,
    ONE_THREAD,
    OPERATOR,
    PRODUCT,
    SCAN,
    STEPS,
    TWO_THREADS,
    equal_lanes,
    threads,
)
from bench.rows.row import Row
from bench.session import Session
from unroll_engine.kernel import unavailable_reason

# Cell, features, hidden, lanes, steps, and the bars by contestant.
CASES: tuple[tuple[str, int, int, int, int, dict[str, float]], ...] = (
    ("rnn_tanh", 12, 128, 64, STEPS, {OPERATOR: 5, SCAN: 1.35}),
    ("rnn_tanh", 64, 512, 64, STEPS, {PRODUCT: 1.1}),
    ("rnn_tanh", 12, 128, 1, LENGTH, {OPERATOR: 2.5}),
    ("lstm", 12, 128, 64, STEPS, {OPERATOR: 1.25}),
    ("gru", 12, 128, 64, STEPS, {OPERATOR: 1.7}),
)


async def measure(session: Session, outcome: Outcome) -> None:
    """Contestants in turns in the worker process, case by case."""
    if reason := unavailable_reason():
        outcome.notes.append(reason)
        return
    for cell, features, hidden, lanes, steps, bars in CASES:
        taken = await session.inside(equal_lanes, cell, features, hidden, lanes, steps)
        where = f"{cell}, {features}/{hidden}/{lanes}, {steps} steps"
        for name, seconds in taken.items():
            outcome.figures.append(Figure(name, f"us, {where}", [second * 1e6 for second in seconds]))
        for name, bar in bars.items():
            outcome.verdicts.append(
                Verdict(f"{name}'s time / {KERNEL}'s, {where}", ratios(taken[name], taken[KERNEL]), bar)
            )
    taken = await session.inside(threads)
    for name, seconds in taken.items():
        outcome.figures.append(Figure(name, "ms for 1,000 x 29 steps", [second * 1e3 for second in seconds]))
    speedup = ratios(taken[ONE_THREAD], taken[TWO_THREADS])
    outcome.verdicts.append(Verdict("one thread's time / two threads'", speedup, 1.9))


ROW = Row("kernel", "step kernel alone, one core: RNN, LSTM, GRU, hidden 128 and 512", measure)
