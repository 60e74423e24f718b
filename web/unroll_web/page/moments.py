"""Moments: where, in the sequences of a source, a unit was as active as now."""

import asyncio
from typing import Any

import numpy as np

from unroll_client import AsyncClient, ModelInfo
from unroll_web.page.frames import Float32Array
from unroll_web.page.sources import Sources

MOST_SEQUENCES = 48
MOST_STEPS = 20_000
MOST_FOUND = 6
_MOST_KEPT = 4
_AT_ONCE = 16


class Moments:
    """States of the first sequences of a source, by `Unroll` calls; the last few (model, source) pairs are kept.

    Args:
        sources: The sources.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._kept: dict[tuple[str, int, bytes, str], list[Float32Array]] = {}

    async def find(
        self, client: AsyncClient, model: ModelInfo, bundle: bytes, source: str, unit: int, value: float
    ) -> list[dict[str, Any]]:
        """Finds the steps at which a unit of the last layer is nearest to a value, one of each sequence.

        Args:
            client: Makes the calls.
            model: The model version.
            bundle: Id of its content.
            source: Name of the source.
            unit: 0-based unit.
            value: The value.

        Returns:
            Up to `MOST_FOUND` of {"index", "step", "value"}, the nearest first.

        Raises:
            ValueError: there is no such source or unit, or the source has another number of features.
            UnrollError: a call failed.
        """
        if not 0 <= unit < model.hidden_size:
            raise ValueError(f"unit: {unit}, the model has 0 to {model.hidden_size - 1}")
        try:
            chosen = await self._sources.get(source)
        except KeyError:
            raise ValueError(f"source: {source!r} is unknown") from None
        if chosen.features != model.input_size:
            raise ValueError(f"source: {source!r} has {chosen.features} features, the model {model.input_size}")
        key = (model.name, model.version, bundle, source)
        if key not in self._kept:
            values = [each.values[:MOST_STEPS] for each in chosen.sequences[:MOST_SEQUENCES]]
            states = await self._states(client, model, values)
            while len(self._kept) >= _MOST_KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = states
        found = []
        for index, rows in enumerate(self._kept[key]):
            step = int(np.abs(rows[:, unit] - value).argmin())
            found.append({"index": index, "step": step, "value": float(rows[step, unit])})
        return sorted(found, key=lambda each: abs(each["value"] - value))[:MOST_FOUND]

    async def _states(self, client: AsyncClient, model: ModelInfo, sequences: list[Float32Array]) -> list[Float32Array]:
        room = asyncio.Semaphore(_AT_ONCE)

        async def states(values: Float32Array) -> Float32Array:
            async with room, client.unroll(model.name, version=model.version) as sequence:
                found = (await sequence.send(values)).states
                assert found is not None
                return found

        return list(await asyncio.gather(*map(states, sequences)))
