"""Classification of sequences of any lengths, in JSON."""

import base64
import json

from starlette.requests import Request
from starlette.responses import Response

from unroll_client import Snapshot
from unroll_web.context import Context
from unroll_web.problems import Problem
from unroll_web.rest.body import read_json, read_snapshot
from unroll_web.rest.floats import decode, encode


async def classify(request: Request, context: Context) -> Response:
    """Answers `POST /v1/models/{name}:classify`."""
    members = await read_json(request, context)
    given = members.take("sequences", list)
    version, form = members.version(), members.floats()
    states = members.take("snapshots", list, [])
    return_snapshots = members.take("return_snapshots", bool, False)
    members.end()
    sequences = [decode(value, f"sequences[{index}]") for index, value in enumerate(given)]
    if states and len(states) != len(sequences):
        raise Problem.at("snapshots", f"{len(states)} for {len(sequences)} sequences")
    snapshots: list[Snapshot | None] = [
        None if value is None else read_snapshot(value, f"snapshots[{index}]") for index, value in enumerate(states)
    ]
    async with context.client(request) as client:
        result = await client.classify(
            sequences,
            model=request.path_params["name"],
            version=version,
            initial_states=snapshots or None,
            return_final_states=return_snapshots,
        )
    rows = [
        {
            "label": label,
            "label_index": int(result.label_indices[index]),
            "probabilities": encode(result.probabilities[index], form),
            "logits": encode(result.logits[index], form),
        }
        for index, label in enumerate(result.labels)
    ]
    for row, state in zip(rows, result.final_states or (), strict=False):
        row["snapshot"] = base64.b64encode(state.to_bytes()).decode()
    content = {"model": result.model, "version": result.version, "results": rows}
    return Response(json.dumps(content, ensure_ascii=False), media_type="application/json")
