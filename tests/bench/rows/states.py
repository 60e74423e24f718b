"""Hidden states streamed, one message a step."""

from functools import partial

from bench.contestants import OURS
from bench.figures import Figure, Outcome
from bench.networks import SMALL
from bench.processes import StartError
from bench.rows import streaming
from bench.rows.row import WARM_UP, Row, hold
from bench.session import Session
from unroll_client.load import Result, stream_loop

SEQUENCES, STREAMS = 256, 8
CHUNKS = (1, 16)
"""Steps of a chunk."""


async def measure(session: Session, outcome: Outcome) -> None:
    """Sequences whose next chunk leaves when the last one is answered."""
    addresses = {}
    for ours in OURS:
        try:
            addresses[ours] = (await session.server(ours, SMALL)).address
        except StartError as error:
            outcome.notes.append(f"{ours}: {error}")
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
        {(ours, steps): partial(feed, address, steps) for ours, address in addresses.items() for steps in CHUNKS}
    )
    for (ours, steps), rounds in results.items():
        for result in rounds:
            hold(ours, result)
        samples = [result.rate * steps for result in rounds]
        messages = Figure(ours, f"messages/s, chunks of {steps}", [r.messages / r.seconds for r in rounds])
        outcome.figures += [Figure(ours, f"steps/s, chunks of {steps}", samples), messages]
    outcome.notes.append(f"{SEQUENCES} sequences on {STREAMS} streams, 128 float32 a step")


ROW = Row("states", "states streamed, one message a step, steps/s a core", measure)
