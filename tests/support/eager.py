"""Eager PyTorch on one sequence, for comparison."""

from typing import TYPE_CHECKING

from support import wire

if TYPE_CHECKING:
    from unroll_export.runs import TrainedRun

TOLERANCE = 1e-5
"""Largest promised difference from eager PyTorch; repeated here, so that the code can't change it."""


def eager(run: "TrainedRun", values: wire.Array) -> tuple[wire.Array, wire.Array]:
    """Computes logits [steps, classes] and states [steps, hidden] of one sequence by eager PyTorch."""
    import torch

    with torch.inference_mode():
        logits, states, _ = run.model.unroll(torch.from_numpy(values)[None])
    return logits[0].numpy(), states[0].numpy()
