"""One-step chunks on streams: values, their states by eager PyTorch, and the loop."""

from collections.abc import Callable

import numpy as np
import torch

from unroll_bench.contest.contestants import MODEL
from unroll_bench.contest.network import TOLERANCE, even, network
from unroll_bench.load import Result, stream_loop
from unroll_proto.v1 import unroll_pb2 as pb

PERIOD = 64
"""Steps after which a stream's values repeat."""
HORIZON = 1024
"""Steps whose states are known."""
EVERY = 16
"""One of so many answers is compared with eager PyTorch, so that the client is not the bottleneck."""


def _state_check() -> Callable[[pb.Steps], bool]:
    (values,) = even(1, PERIOD)
    with torch.inference_mode():
        x = torch.from_numpy(np.tile(values, (HORIZON // PERIOD, 1)))
        known = network().unroll(x[None])[1][0].numpy()

    def check(steps: pb.Steps) -> bool:
        first = steps.first_step
        if first % EVERY or first + steps.count > HORIZON:
            return True
        states = np.frombuffer(steps.states, "<f4").reshape(-1, known.shape[1])
        return bool(np.abs(states - known[first : first + steps.count]).max() <= TOLERANCE)

    return check


async def feed(
    address: str, sequences: int, streams: int, cadence: float | None, seconds: float, warm_up: float, batch: int = 1
) -> Result:
    """Feeds open sequences a step at a time, and checks their states; see `stream_loop`."""
    (values,) = even(1, PERIOD)
    return await stream_loop(
        address,
        sequences=sequences,
        streams=streams,
        cadence=cadence,
        chunk_steps=1,
        batch=batch,
        seconds=seconds,
        warm_up=warm_up,
        model=MODEL,
        values=values,
        check=_state_check(),
    )
