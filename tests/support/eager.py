"""Eager PyTorch on one sequence, to hold answers against."""

from typing import TYPE_CHECKING

from support import wire

if TYPE_CHECKING:
    from unroll_export.runs import TrainedRun

TOLERANCE = 1e-5
"""What the promise says of any difference from eager PyTorch; written here, so that the code can't move it."""


def eager(run: "TrainedRun", values: wire.Array) -> tuple[wire.Array, wire.Array]:
    """Logits [steps, classes] and states [steps, hidden] of one sequence by eager PyTorch."""
    import torch

    with torch.inference_mode():
        logits, states, _ = run.model.unroll(torch.from_numpy(values)[None])
    return logits[0].numpy(), states[0].numpy()
