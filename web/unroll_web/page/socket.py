"""The page's WebSocket: runs of sequences, and what is asked about them.

Requests are JSON objects with `op`, an `id` that the answers repeat, and the fields of the operation; `run` names one
of at most four runs. Answers are frames (`unroll_web.page.frames`) with an `event`: "opened", "steps", "done", "lost",
"resumed", "error", or the operation's own.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from unroll_client import AsyncClient, UnrollError
from unroll_proto.sequences import SequenceError
from unroll_web.page.arithmetic import analysis, unit_arithmetic
from unroll_web.page.blocks import block_values
from unroll_web.page.exports import export
from unroll_web.page.fields import integer, number, text
from unroll_web.page.frames import Float32Array, frame, unpack_values
from unroll_web.page.moments import Moments
from unroll_web.page.network import Network
from unroll_web.page.run import Run
from unroll_web.page.weights import WeightsUnavailableError, network_of

MOST_RUNS = 4
MOST_MESSAGE_BYTES = 2**24
MOST_PENDING = 256

Request = Mapping[str, Any]
Send = Callable[[bytes], Awaitable[None]]


class Connection:
    """One page: its runs, and the operations in flight.

    Args:
        client: A client that does not reconnect by itself.
        models: Folder of bundles, for weights; None if there is none.
        moments: States of other sequences.
        target: Address of the server, for exported scripts.
        send: Sends a frame.
    """

    def __init__(self, client: AsyncClient, models: Any, moments: Moments, target: str, send: Send) -> None:
        self._client = client
        self._models = models
        self._moments = moments
        self._target = target
        self._send = send
        self._runs: dict[str, Run] = {}
        self._tasks: dict[asyncio.Task[None], str] = {}
        self._orders: dict[str, asyncio.Lock] = {}

    def receive(self, message: str) -> None:
        """Begins an operation."""
        try:
            request = json.loads(message)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            request = {}
        run = str(request.get("run", ""))[:64]
        if request.get("op") == "open":
            # What was asked of the run before is of no use any more.
            for task in [task for task, name in self._tasks.items() if name == run]:
                task.cancel()
        task = asyncio.create_task(self._answer(request, run))
        self._tasks[task] = run
        task.add_done_callback(self._tasks.pop)

    @property
    def full(self) -> bool:
        """True if no more operations should be begun now."""
        return len(self._tasks) >= MOST_PENDING

    async def close(self) -> None:
        """Cancels all operations and ends the runs."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(run.close() for run in self._runs.values()), return_exceptions=True)

    async def _answer(self, request: Request, run: str) -> None:
        head = {"id": request.get("id"), "run": run}
        try:
            async with self._orders.setdefault(run, asyncio.Lock()):
                async for header, arrays in self._operation(request)(request, run):
                    await self._send(frame({**head, **header}, arrays))
        except (UnrollError, WeightsUnavailableError, SequenceError, ValueError) as error:
            kind = "no_weights" if isinstance(error, WeightsUnavailableError) else "error"
            with suppress(RuntimeError, WebSocketDisconnect):
                await self._send(frame({**head, "event": kind, "message": str(error)}))
        except (RuntimeError, WebSocketDisconnect):
            return  # The page has left.

    def _operation(self, request: Request) -> Callable[[Request, str], AsyncIterator[tuple[Any, Any]]]:
        operations = {
            "open": self._open,
            "advance": self._advance,
            "close": self._close_run,
            "blocks": self._blocks,
            "arithmetic": self._arithmetic,
            "analysis": self._analysis,
            "moments": self._find_moments,
            "export": self._export,
        }
        name = request.get("op")
        if not isinstance(name, str) or name not in operations:
            raise ValueError(f"op: one of {', '.join(operations)} expected")
        return operations[name]

    async def _open(self, request: Request, name: str) -> AsyncIterator[tuple[Any, Any]]:
        """Begins a run: of `model` and `version`, or from `step` of the run `from`."""
        if name not in self._runs and len(self._runs) >= MOST_RUNS:
            raise ValueError(f"run: {MOST_RUNS} at most")
        base = None
        if "from" in request:
            base = await self._run(text(request, "from")).snapshot(integer(request, "step"))
            model, version = base.model, base.version
        else:
            model, version = text(request, "model"), integer(request, "version", default=0)
        info = await self._client.model(model, version)
        run = Run(self._client, info, partial(self._notify, name), base)
        old = self._runs.pop(name, None)
        if old is not None:
            await old.close()
        self._runs[name] = run
        await run.open()
        blocks = [
            {"name": each.name, "kind": each.kind, "layer": each.layer, "width": each.width} for each in run.blocks
        ]
        header = {"event": "opened", "model": info.name, "version": info.version, "step": run.begin}
        # The blocks before the first step, which its arithmetic begins with.
        initial = block_values(run.blocks, await run.snapshot(run.begin))
        yield {**header, "blocks": blocks, "bundle": run.bundle.hex()}, {"initial": initial}

    async def _advance(self, request: Request, name: str) -> AsyncIterator[tuple[Any, Any]]:
        run = self._run(name)
        values = unpack_values("values", request.get("values"), run.model.input_size, run.room)
        async for part in run.advance(values):
            yield {"event": "steps", "first": part.first, "ms": part.seconds * 1e3}, part.arrays()
        yield {"event": "done", "step": run.begin + len(run.values)}, None

    async def _close_run(self, _: Request, name: str) -> AsyncIterator[tuple[Any, Any]]:
        run = self._runs.pop(name, None)
        if run is not None:
            await run.close()
        yield {"event": "closed"}, None

    async def _blocks(self, request: Request, name: str) -> AsyncIterator[tuple[Any, Any]]:
        """The whole state after `step` timesteps, and the one before."""
        run = self._run(name)
        step = integer(request, "step")
        states = [block_values(run.blocks, await run.snapshot(max(each, run.begin))) for each in (step - 1, step)]
        yield {"event": "blocks", "step": step}, {"blocks": np.stack(states)}

    async def _arithmetic(self, request: Request, name: str) -> AsyncIterator[tuple[Any, Any]]:
        """The sum behind `unit` of `layer` in timestep `step`."""
        run = self._run(name)
        network = self._network(run)
        step, layer, unit = (integer(request, field) for field in ("step", "layer", "unit"))
        before, after = await run.snapshot(step), await run.snapshot(step + 1)
        if not 0 <= layer < run.model.num_layers:
            raise ValueError(f"layer: {layer}, the model has 0 to {run.model.num_layers - 1}")
        x: Float32Array = run.values[step - run.begin] if layer == 0 else after.state[0][layer - 1]
        h = before.state[0][layer]
        c = before.state[1][layer] if len(before.state) > 1 else np.zeros_like(h)
        found = unit_arithmetic(network, layer, unit, x, h, c)
        yield {"event": "arithmetic", **found, "served": float(after.state[0][layer][unit]), "step": step}, None

    async def _analysis(self, request: Request, name: str) -> AsyncIterator[tuple[Any, Any]]:
        """Gradients of the answer after `step` timesteps, of W_hh times `factor`."""
        run = self._run(name)
        if run.begin:
            raise ValueError("run: a fork has no gradient before its beginning; take the run that it is of")
        values = run.values[: integer(request, "step")]
        target, factor = integer(request, "target", default=-1), number(request, "factor", default=1.0, most=10.0)
        header, arrays = await asyncio.to_thread(analysis, self._network(run), values, target, factor)
        yield {"event": "analysis", **header, "factor": factor}, arrays

    async def _find_moments(self, request: Request, name: str) -> AsyncIterator[tuple[Any, Any]]:
        """Moments in a source's other sequences where `unit` was as active as `value`."""
        run = self._run(name)
        unit, value = integer(request, "unit"), number(request, "value", default=0.0)
        found = await self._moments.find(self._client, run.model, run.bundle, text(request, "source"), unit, value)
        yield {"event": "moments", "unit": unit, "moments": found}, None

    async def _export(self, request: Request, name: str) -> AsyncIterator[tuple[Any, Any]]:
        run = self._run(name)
        base = await run.snapshot(run.begin) if run.begin else None
        last = await run.snapshot(run.begin + sum(len(part.logits) for part in run.parts))
        file, content = export(run, text(request, "kind"), self._target, base, last)
        # As an array, so that the frame stays of one kind: bytes, padded to whole float32.
        padded = np.frombuffer(content + b"\0" * (-len(content) % 4), "<f4")
        yield {"event": "export", "file": file, "bytes": len(content)}, {"content": padded}

    def _run(self, name: str) -> Run:
        if name not in self._runs:
            raise ValueError(f"run: {name!r} is not open")
        return self._runs[name]

    def _network(self, run: Run) -> Network:
        return network_of(self._models, run.model, run.bundle)

    async def _notify(self, name: str, header: dict[str, Any]) -> None:
        await self._send(frame({"run": name, **header}))


async def serve(socket: WebSocket, client: AsyncClient, models: Any, moments: Moments, target: str) -> None:
    """Serves one page until it leaves."""
    await socket.accept()
    order = asyncio.Lock()

    async def send(content: bytes) -> None:
        async with order:
            await socket.send_bytes(content)

    connection = Connection(client, models, moments, target, send)
    try:
        while True:
            message = await socket.receive_text()
            if len(message) > MOST_MESSAGE_BYTES or connection.full:
                await socket.close(1009 if len(message) > MOST_MESSAGE_BYTES else 1013)
                return
            connection.receive(message)
    except (WebSocketDisconnect, KeyError):
        return  # It left, or sent bytes, which no page does.
    finally:
        await connection.close()
