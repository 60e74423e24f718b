"""Hidden states streamed, one message a step."""

from functools import partial

from bench.contestants import ENVOY, OURS
from bench.figures import Figure, Outcome, Verdict
from bench.networks import SMALL
from bench.processes import StartError
from bench.rows import streaming
from bench.rows.row import WARM_UP, Row, hold
from bench.session import Session
from unroll_client.load import Result, stream_loop

SEQUENCES, STREAMS = 256, 8
BAR = 50_000
CHUNKS = (1, 16)
"""Steps of a chunk; the bar is on the first, whose answers carry one step each."""


async def measure(session: Session, outcome: Outcome) -> None:
    """Sequences whose next chunk leaves when the last one is answered."""
    addresses = {}
    for front in OURS:
        try:
            addresses[front] = (await session.server(front, SMALL)).address
        except StartError as error:
            outcome.notes.append(f"{front}: {error}")
    check = streaming.state_check(SMALL)

    async def feed(address: str, steps: int) -> Result:
        return await stream_loop(
            address,
            sequences=SEQUENCES,
            streams=STREAMS,
            cadence=None,
            chunk_steps=steps,
            seconds=session.seconds,
            warm_up=WARM_UP,
            model=SMALL,
            values=streaming.values(SMALL),
            check=check,
        )

    results = await session.in_turns(
        {(front, steps): partial(feed, address, steps) for front, address in addresses.items() for steps in CHUNKS}
    )
    for (front, steps), rounds in results.items():
        for result in rounds:
            hold(front, result)
        samples = [result.rate * steps for result in rounds]
        messages = Figure(front, f"messages/s, chunks of {steps}", [r.messages / r.seconds for r in rounds])
        outcome.figures += [Figure(front, f"steps/s, chunks of {steps}", samples), messages]
        if (front, steps) == (ENVOY, 1):
            outcome.verdicts.append(Verdict(f"{front}, one step a message", samples, BAR, unit="steps/s"))
    if ENVOY not in addresses:
        outcome.verdicts.append(Verdict(ENVOY, [], BAR, unit="steps/s", source="no Envoy front here"))
    outcome.notes.append(f"{SEQUENCES} sequences on {STREAMS} streams, 128 float32 a step")


ROW = Row("states", "states streamed, one message a step, steps/s a core", measure)
