"""The engine of Unroll: loads model bundles and runs sequences on them, without a server.

engine = Engine.load("models/jv")
engine.classify(sequences).labels        # arrays [steps, features] of any lengths
sequence = engine.open()
sequence.advance(chunk).states           # of every timestep; sequence.snapshot() keeps the state
Predictor("models/jv")(table)            # arrays, pandas, Arrow, torch -> columns; picklable, for clusters
"""

from unroll_engine.arrays import Ragged
from unroll_engine.engine import Classification, Engine
from unroll_engine.errors import (
    InternalError,
    InvalidRequestError,
    RequestError,
    RuntimeUnavailableError,
    SequenceStateError,
)
from unroll_engine.predictor import Predictor
from unroll_engine.sequence import OpenSequence, Steps
from unroll_proto.bundle import BundleError
from unroll_proto.snapshot import Snapshot

__all__ = [
    "BundleError",
    "Classification",
    "Engine",
    "InternalError",
    "InvalidRequestError",
    "OpenSequence",
    "Predictor",
    "Ragged",
    "RequestError",
    "RuntimeUnavailableError",
    "SequenceStateError",
    "Snapshot",
    "Steps",
]
