"""Streams of the state after each timestep, as Server-Sent Events."""

import base64
import json
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from unroll_client import AsyncSequence, ModelInfo, Snapshot, Steps, UnrollError
from unroll_web.context import Context
from unroll_web.problems import Problem
from unroll_web.rest.body import read_json, read_snapshot
from unroll_web.rest.floats import decode, encode

RESULTS = ("states", "logits", "probabilities")
# Timesteps that are sent at a time: so many answers wait for a slow reader at most.
_CHUNK = 256


async def unroll(request: Request, context: Context) -> Response:
    """Answers `POST /v1/models/{name}:unroll`.

    The sequence is opened before the answer begins, so that a refusal of it is an ordinary problem.
    """
    members = await read_json(request, context)
    values = decode(members.take("sequence", object), "sequence")
    version, form = members.version(), members.floats()
    state = members.take("snapshot", str, "")
    every = members.take("every", int, 1)
    wanted = members.take("return", list, list(RESULTS))
    members.end()
    if unknown := [name for name in wanted if name not in RESULTS]:
        raise Problem.at("return", f"{', '.join(RESULTS)} expected, got {str(unknown[0])[:64]!r}")
    snapshot = read_snapshot(state, "snapshot") if state else None
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(context.client(request))
        info = await client.model(request.path_params["name"], version or (snapshot.version if snapshot else 0))
        sequence = client.unroll(
            info.name,
            version=info.version,
            snapshot=snapshot,
            states="states" in wanted,
            logits=bool({"logits", "probabilities"} & set(wanted)),
            every=every,
        )
        await stack.enter_async_context(sequence)
        stream = _Stream(context, sequence, info, wanted, form)
        chunks = _chunks(values)
        # The first answer too: values that can't be used are refused by it.
        first = await sequence.send(chunks[0])
        return EventStream(stream.events(first, chunks[1:]), stack.pop_all())
    raise AssertionError


class EventStream(StreamingResponse):
    """Answer of Server-Sent Events.

    Args:
        events: Encoded events.
        resources: Closed when the answer has ended, also when the caller has left.
    """

    def __init__(self, events: AsyncGenerator[bytes], resources: AsyncExitStack) -> None:
        # The header asks proxies not to hold events back.
        super().__init__(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self._events = events
        self._resources = resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer."""
        async with self._resources, aclosing(self._events):
            await super().__call__(scope, receive, send)


def _chunks(values: Any) -> list[Any]:
    """Cuts a sequence [steps, features] into chunks; one that is no array is a single chunk, which will be refused."""
    return [values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK)] or [values]


class _Stream:
    """Events of one sequence.

    Args:
        context: Parts of the process.
        sequence: The open sequence.
        info: Its model.
        wanted: Some of RESULTS.
        form: Form of arrays.
    """

    def __init__(
        self, context: Context, sequence: AsyncSequence, info: ModelInfo, wanted: list[str], form: str
    ) -> None:
        self._context = context
        self._sequence = sequence
        self._classifies = bool(info.hidden_size)
        self._labels = info.class_labels
        self._wanted = wanted
        self._form = form

    async def events(self, first: Steps, chunks: list[Any]) -> AsyncGenerator[bytes]:
        """Yields the events: `open`, `step` for each step, and `end`; or `error` when the sequence fails."""
        sequence = self._sequence
        yield _event("open", {"model": sequence.model, "version": sequence.version, "step": first.first_step})
        try:
            for event in self._steps(first):
                yield event
            for chunk in chunks:
                if self._context.draining.is_set():
                    yield _event("end", _summary("draining", await sequence.close()))
                    return
                async with aclosing(sequence.stream(chunk)) as answers:
                    async for steps in answers:
                        for event in self._steps(steps):
                            yield event
            yield _event("end", _summary("complete", await sequence.close()))
        except UnrollError as error:
            state = {"snapshot": _text(error.snapshot), "step": error.snapshot.step} if error.snapshot else {}
            yield _event("error", Problem.of(error).content | state)
        except Problem as problem:
            yield _event("error", problem.content)

    def _steps(self, steps: Steps) -> list[bytes]:
        columns: dict[str, NDArray[np.float32]] = {}
        outputs = steps.outputs if "logits" in self._wanted else {}
        probabilities = steps.probabilities if self._classifies and "probabilities" in self._wanted else None
        if self._classifies:
            # A step model has outputs under names of its own, and no hidden state.
            columns, outputs = outputs, {}
        if self._classifies and steps.states is not None:
            columns["state"] = steps.states
        if probabilities is not None:
            columns["probabilities"] = probabilities
        events = []
        for index, step in enumerate(steps.steps.tolist()):
            content: dict[str, Any] = {"step": step}
            content |= {name: encode(column[index], self._form) for name, column in columns.items()}
            if outputs:
                content["outputs"] = {name: encode(rows[index], self._form) for name, rows in outputs.items()}
            if probabilities is not None:
                best = int(probabilities[index].argmax())
                content |= {"label": self._labels[best], "label_index": best}
            events.append(_event("step", content, step))
        return events


def _summary(reason: str, snapshot: Snapshot) -> dict[str, Any]:
    return {"reason": reason, "step": snapshot.step, "snapshot": _text(snapshot)}


def _text(snapshot: Snapshot) -> str:
    return base64.b64encode(snapshot.to_bytes()).decode()


def _event(name: str, content: dict[str, Any], number: int | None = None) -> bytes:
    """Encodes an event; JSON has no line ends."""
    line = "" if number is None else f"id: {number}\n"
    return f"{line}event: {name}\ndata: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
