"""Blocks: the parts of a model's state, each a row of units, as the page draws them."""

import math
from dataclasses import dataclass

import numpy as np

from unroll_client import ModelInfo, Snapshot
from unroll_web.page.frames import Float32Array

MOST_UNITS = 2048
"""Units of a block that are shown; a step model's state can be of any size."""


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the state.

    Attributes:
        name: Name that the page shows.
        kind: "h", "c" or "state".
        tensor: Index of the state tensor.
        layer: 0-based layer; 0 for a step model.
        offset: Index of its first value in the tensor.
        width: Its units.
    """

    name: str
    kind: str
    tensor: int
    layer: int
    offset: int
    width: int


def blocks_of(model: ModelInfo) -> tuple[Block, ...]:
    """Returns the blocks of a model's state, the lowest layer first."""
    if model.architecture == "step":
        shown = [(index, each) for index, each in enumerate(model.states) if each.dtype == "float32"]
        return tuple(
            Block(each.name, "state", index, 0, 0, min(math.prod(each.shape), MOST_UNITS)) for index, each in shown
        )
    kinds = ("h", "c") if model.architecture == "simple_lstm" else ("h",)
    width = model.hidden_size
    return tuple(
        Block(f"{kind}, layer {layer + 1}" if model.num_layers > 1 else kind, kind, tensor, layer, layer * width, width)
        for layer in range(model.num_layers)
        for tensor, kind in enumerate(kinds)
    )


def block_values(blocks: tuple[Block, ...], snapshot: Snapshot) -> Float32Array:
    """Returns the values of all blocks in a snapshot, concatenated."""
    parts = [
        np.frombuffer(snapshot.data[each.tensor], "<f4")[each.offset : each.offset + each.width] for each in blocks
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)
