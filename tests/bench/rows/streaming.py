"""What rows about streams share: values, and the states that eager PyTorch gives them."""

from collections.abc import Callable

import numpy as np
import torch
from support.eager import TOLERANCE

from bench.networks import even, network
from unroll_engine.models.spec import Float32Array
from unroll_proto.v1 import unroll_pb2 as pb

PERIOD = 64
"""Steps after which a stream's values repeat."""
HORIZON = 1024
"""Steps whose states are known."""
EVERY = 16
"""One of so many answers is held against eager PyTorch: the client shall not be what is measured."""


def values(name: str) -> Float32Array:
    """[PERIOD, features], what every sequence of a stream goes through again and again."""
    return even(name, 1, PERIOD)[0]


def state_check(name: str) -> Callable[[pb.Steps], bool]:
    """A check of answers to sequences of `values`."""
    with torch.inference_mode():
        x = torch.from_numpy(np.tile(values(name), (HORIZON // PERIOD, 1)))
        known = network(name).unroll(x[None])[1][0].numpy()

    def check(steps: pb.Steps) -> bool:
        first = steps.first_step
        if first % EVERY or first + steps.count > HORIZON:
            return True
        states = np.frombuffer(steps.states, "<f4").reshape(-1, known.shape[1])
        return bool(np.abs(states - known[first : first + steps.count]).max() <= TOLERANCE)

    return check
