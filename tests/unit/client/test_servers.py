"""Several addresses: calls go to those that are alive, in turn; what an address is, and what a client doesn't say."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
from unit.client.harness import MODEL, LocalServer

from unroll_client import AsyncClient, Client, Unavailable
from unroll_client._channel import Connection, targets_of

VALUES = np.ones((4, 3), np.float32)
Start = Callable[..., LocalServer]


@pytest.mark.parametrize(
    ("target", "targets"),
    [
        ("a:1", ("a:1",)),
        ("a:1,b:2", ("a:1", "b:2")),
        ("a:1, b:2,a:1", ("a:1", "b:2")),
        (["a:1", "b:2,[::1]:3"], ("a:1", "b:2", "[::1]:3")),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", ("ipv4:127.0.0.1:1,127.0.0.1:2",)),
        (("unix:/tmp/a,b", "dns:///c:1"), ("unix:/tmp/a,b", "dns:///c:1")),
    ],
)
def test_addresses(target: str | list[str], targets: tuple[str, ...]) -> None:
    assert targets_of(target) == targets


@pytest.mark.parametrize("target", ["", ",", "a:1,", [], ["a:1", ""]])
def test_an_address_that_is_missing(target: str | list[str]) -> None:
    with pytest.raises(ValueError, match="an address is missing"):
        AsyncClient(target)


@pytest.mark.parametrize("separate", [True, False])
async def test_calls_take_turns(start: Start, separate: bool) -> None:
    servers = [start(MODEL) for _ in range(3)]
    addresses = [server.address for server in servers]
    target = addresses if separate else ",".join(addresses)
    async with AsyncClient(target, coalesce=False, wait_for_ready=True) as client:
        while not all(server.calls["Classify"] for server in servers):
            assert len(await client.classify([VALUES])) == 1


async def test_calls_go_to_who_is_left(start: Start) -> None:
    dead, first, second = start(MODEL), start(MODEL), start(MODEL)
    dead.stop()
    async with AsyncClient([dead.address, first.address, second.address], coalesce=False) as client:
        await asyncio.gather(*(client.classify([VALUES]) for _ in range(50)))
        first.stop()
        await asyncio.gather(*(client.classify([VALUES]) for _ in range(50)))
        async with client.unroll() as sequence:
            assert (await sequence.send(VALUES)).count == 4
        second.stop()
        with pytest.raises(Unavailable):
            await client.models(timeout=5)


async def test_who_waits_gets_the_first_that_comes(start: Start) -> None:
    servers = [start(MODEL), start(MODEL)]
    for server in servers:
        server.stop()
    async with AsyncClient([server.address for server in servers], wait_for_ready=True) as client:
        calling = [asyncio.create_task(client.classify([VALUES])), asyncio.create_task(client.unroll().open())]
        await asyncio.sleep(0)
        start(MODEL, port=servers[1].port)
        await asyncio.gather(*calling)


def test_secrets_are_in_no_representation() -> None:
    word = "TOKEN"
    connection = Connection(("a:1",), certificate=(b"CERT", b"KEY"), token=word, metadata=(("x", "OTHER"),))
    assert not any(secret in repr(connection) for secret in ("KEY", word, "OTHER"))


@pytest.mark.parametrize("token", ["two words", "line\n", "ä"])
def test_a_token_that_cannot_be_sent(token: str) -> None:
    with pytest.raises(ValueError, match="token: only visible ASCII characters") as caught:
        Client("a:1", token=token)
    assert token not in str(caught.value)
