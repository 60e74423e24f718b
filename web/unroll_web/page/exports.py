"""Files of a run: a Python script that repeats it, JSON, npz."""

import base64
import io
import json
from typing import Any

import numpy as np

from unroll_client import Snapshot
from unroll_web.page.frames import Float32Array
from unroll_web.page.run import Run

_SCRIPT = '''"""Repeats a run of the RNN Unroller: pip install unroll-client"""

import base64

import numpy as np

from unroll_client import Client, Snapshot

VALUES = np.frombuffer(
    base64.b64decode({values!r}),
    "<f4",
).reshape(-1, {width})
SNAPSHOT = {snapshot}

with Client({target!r}) as client:
    with client.unroll({model!r}, version={version}, snapshot=SNAPSHOT, logits=True) as sequence:
        steps = sequence.send(VALUES)
        for step, state, logits in zip(steps.steps, steps.states, steps.logits):
            print(step, state[:4], logits)
        sequence.snapshot().save("state.bin")
'''


def export(run: Run, kind: str, target: str, base: Snapshot | None, last: Snapshot) -> tuple[str, bytes]:
    """Writes a run as a file.

    Args:
        run: The run.
        kind: "py", "json", "npz" or "snapshot".
        target: Address of the server.
        base: Snapshot that the run began from; None for the zero state.
        last: The state now.

    Returns:
        The file's name and content.

    Raises:
        ValueError: the kind is another one.
    """
    name = f"{run.model.name}-{run.model.version}-{run.begin + len(run.values)}-steps"
    if kind == "py":
        text = _SCRIPT.format(
            values=base64.b64encode(run.values.astype("<f4").tobytes()).decode(),
            width=run.model.input_size,
            snapshot=f"Snapshot.from_bytes(base64.b64decode({_base64(base)!r}))" if base else "None",
            target=target,
            model=run.model.name,
            version=run.model.version,
        )
        return f"{name}.py", text.encode()
    if kind == "snapshot":
        return f"{name}.state.bin", last.to_bytes()
    arrays = _arrays(run)
    if kind == "npz":
        buffer = io.BytesIO()
        # The arrays that `unroll classify` reads, and the answers.
        np.savez_compressed(buffer, lengths=np.array([len(run.values)]), **arrays)  # type: ignore[arg-type] # all arrays
        return f"{name}.npz", buffer.getvalue()
    if kind == "json":
        content: dict[str, Any] = {
            "model": run.model.name,
            "version": run.model.version,
            "bundle": run.bundle.hex(),
            "first_step": run.begin,
            "class_labels": run.model.class_labels,
            "initial_snapshot": _base64(base) if base else None,
            "snapshot": _base64(last),
            **{key: array.astype(np.float64).tolist() for key, array in arrays.items()},
        }
        return f"{name}.json", (json.dumps(content) + "\n").encode()
    raise ValueError(f"kind: {kind!r:.40}, 'py', 'json', 'npz' or 'snapshot' expected")


def _arrays(run: Run) -> dict[str, Float32Array]:
    found = {"values": run.values[: sum(len(part.logits) for part in run.parts)]}
    if run.parts:
        for name in ("states", "logits", "probabilities"):
            found[name] = np.concatenate([getattr(part, name) for part in run.parts])
    return found


def _base64(snapshot: Snapshot) -> str:
    return base64.b64encode(snapshot.to_bytes()).decode()
