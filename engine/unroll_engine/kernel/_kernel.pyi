"""Compiled part of the kernel. Written by hand; tests/unit/engine/test_kernel.py calls everything here."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float32]

def isas() -> list[str]: ...
def tanh(x: _Floats, isa: str = "") -> _Floats: ...
def sigmoid(x: _Floats, isa: str = "") -> _Floats: ...
def pack(arrays: tuple[Any, ...], features: int) -> tuple[_Floats, NDArray[np.int64]] | None: ...

class Network:
    def __init__(
        self,
        cell: str,
        scale: tuple[_Floats, _Floats] | None,
        layers: Sequence[tuple[_Floats, _Floats, _Floats]],
        readout: _Floats,
        bias: _Floats,
        isa: str = "",
    ) -> None: ...
    def run_one(
        self,
        x: _Floats,
        state: Sequence[_Floats] | None = None,
        final_state: Sequence[_Floats] | None = None,
        states: _Floats | None = None,
        logits: _Floats | None = None,
    ) -> None: ...
    def run_lanes(
        self,
        x: _Floats,
        state: Sequence[_Floats],
        final_state: Sequence[_Floats],
        states: _Floats | None,
        logits: _Floats,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def input_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def output_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def state_tensors(self) -> int: ...

class Queue:
    def __init__(self, network: Network, slots: int, threads: int) -> None: ...
    def submit(
        self,
        x: _Floats,
        state: Sequence[_Floats] | None = None,
        final_state: Sequence[_Floats] | None = None,
        states: _Floats | None = None,
        logits: _Floats | None = None,
        deadline: int = 0,
    ) -> int: ...
    def submit_batch(
        self,
        values: _Floats,
        offsets: Sequence[int],
        first: int,
        state: Sequence[_Floats] | None,
        final_state: Sequence[_Floats] | None,
        logits: _Floats,
        states: _Floats | None = None,
    ) -> int: ...
    def advance(self, budget: int, rounds: int = ...) -> tuple[int, list[tuple[int, int, int]]]: ...
    def cancel(self, ticket: int) -> bool: ...
    def __len__(self) -> int: ...
