"""Replicas that serve sessions of a small model, for tests of the sessions and their stores."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np

from support.models import random_network, served
from unroll_engine.async_engine import AsyncEngine
from unroll_engine.models.spec import Float32Array
from unroll_server.identity.quotas import Quotas
from unroll_server.repository.catalog import Catalog
from unroll_server.sessions.chunk import Advance
from unroll_server.sessions.service import Sessions
from unroll_server.sessions.store import Store
from unroll_server.telemetry.metrics import Metrics

MODEL = served(random_network())
NEWER = served(random_network(seed=1), version=2)


def ask(session_id: str = "s", values: Float32Array | None = None, **more: object) -> Advance:
    """Returns a request for a session, without steps if no values are given."""
    none = np.empty((0, MODEL.spec.input_size), np.float32)
    plain = Advance("", session_id, "", 0, False, False, None, none if values is None else values)
    return replace(plain, **more)  # type: ignore[arg-type]  # each test knows its fields


@asynccontextmanager
async def replicas(
    *stores: Store,
    queued: int = 10**6,
    catalog: Catalog | None = None,
    quotas: Quotas | None = None,
    count: Callable[[str], None] = lambda _: None,
) -> AsyncIterator[list[Sessions]]:
    """Serves MODEL and NEWER from a replica for each store, each with its own engine.

    Args:
        stores: The stores, which may be one several times; they are closed at the end.
        queued: Most timesteps in the queue of each engine.
        catalog: Catalog of all replicas, with MODEL and NEWER; made if absent.
        quotas: See Sessions.
        count: See Sessions.
    """
    catalog = catalog or Catalog([MODEL, NEWER])
    engines = [
        AsyncEngine([MODEL, NEWER], max_lanes=4, tick_steps=5, max_queued_steps=queued, metrics=Metrics())
        for _ in stores
    ]
    try:
        yield [Sessions(store, catalog, engine, count, quotas) for store, engine in zip(stores, engines, strict=True)]
    finally:
        for engine in engines:
            await asyncio.to_thread(engine.close)
        for store in {id(store): store for store in stores}.values():
            await store.close()
