"""Callers with tokens, and operators, by the generated client."""

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from support.processes import ServerProcess
from support.waiting import wait_until
from unroll_server.identity.tokens import digest_of

Metadata = tuple[tuple[str, str], ...]


def bearer(token: str) -> Metadata:
    """Returns the metadata of a token."""
    return (("authorization", f"Bearer {token}"),)


def write_identities(path: Path, **identities: Mapping[str, Any]) -> Path:
    """Writes a file of identities atomically, each with the token TOKEN-NAME; returns its path."""
    lines: list[str] = []
    for name, options in identities.items():
        lines += [f"[identities.{name}]", f'tokens = ["sha256:{digest_of(f"TOKEN-{name}").hex()}"]']
        lines += [f"{option} = {str(value).lower()}" for option, value in options.items()]
    new = path.with_suffix(".new")
    new.write_text("\n".join(lines))
    return new.replace(path)


def admin_address(server: ServerProcess) -> str:
    """Returns HOST:PORT of the admin listener from the log."""
    found = re.findall(r"admin on (\S+:\d+)", server.log)
    assert len(found) == 1, server.log
    return str(found[0])


def metrics_address(server: ServerProcess) -> str:
    """Returns HOST:PORT of the metrics from the log."""
    (found,) = re.findall(r"metrics on http://(\S+)/metrics", server.log)
    return str(found)


@asynccontextmanager
async def channel_to(address: str) -> AsyncIterator[grpc.aio.Channel]:
    """Yields a channel with its own connection."""
    async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield channel


def wait_for_log(server: ServerProcess, text: str, times: int = 1) -> None:
    """Waits until the server has logged a text a number of times."""
    wait_until(lambda: server.log.count(text) >= times, lambda: server.log)
