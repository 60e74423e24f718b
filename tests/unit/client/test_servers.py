"""Several addresses: calls go in turn to reachable servers; forms of addresses; secrets stay secret."""

import asyncio
from collections.abc import Callable
from traceback import TracebackException

import numpy as np
import pytest
from unit.client.harness import MODEL, LocalServer

from unroll_client import AsyncClient, Client, DeadlineExceeded, Unavailable

VALUES = np.ones((4, 3), np.float32)
WORD = "TOKEN"
METADATA = (("x", "OTHER"),)
Start = Callable[..., LocalServer]


@pytest.mark.parametrize("target", ["", ",", "a:1,", [], ["a:1", ""]])
def test_an_address_that_is_missing(target: str | list[str]) -> None:
    with pytest.raises(ValueError, match="an address is missing"):
        AsyncClient(target)


@pytest.mark.parametrize(
    "target",
    [
        "http://a:1",
        "https://a:1",
        "grpc://a:1",
        "grpcs://a:1",
        "a:1/path",
        "//a:1",
        "a",
        "a:",
        ":1",
        "a:0",
        "a:65536",
        "a:http",
        "::1",
        "[::1]",
        "[::1:50051",
        "b:1,http://a:1",
        ["b:1", "a b:1"],
        "user@a:1",
    ],
)
def test_what_is_not_an_address(target: str | list[str]) -> None:
    with pytest.raises(ValueError, match=r"^target: HOST:PORT or unix:/PATH expected, got '") as caught:
        Client(target)
    assert ("tls" in str(caught.value)) is ("s://" in str(target))


@pytest.mark.parametrize("wait_for_ready", [False, True])
async def test_a_proxy_that_is_in_between_is_named(monkeypatch: pytest.MonkeyPatch, wait_for_ready: bool) -> None:
    for name in ("grpc_proxy", "https_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:1")
    async with AsyncClient("unroll.invalid:2", timeout=2, wait_for_ready=wait_for_ready) as client:
        calls = [
            client.models(),
            client.model(),
            client.classify([VALUES]),
            client.advance("id", VALUES),
            client.unroll(timeout=2).open(),
        ]
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, Unavailable | DeadlineExceeded)
            hint = "127.0.0.1:1 (http_proxy in the environment): list the host in no_proxy to go without"
            assert error.message.endswith(hint)
            assert str(error) == error.message
            assert "secret" not in error.message


@pytest.mark.parametrize(
    ("variable", "target"),
    [("no_proxy", "127.0.0.1:1"), ("no_grpc_proxy", "127.0.0.1:1"), ("PROXY", "unix:/nowhere"), ("", "127.0.0.1:1")],
)
async def test_no_proxy_is_named_that_is_not_in_between(
    monkeypatch: pytest.MonkeyPatch, variable: str, target: str
) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:2")
        monkeypatch.setenv(variable, "localhost, 127.0.0.1")
    async with AsyncClient(target, timeout=0.5) as client:
        with pytest.raises((Unavailable, DeadlineExceeded)) as caught:
            await client.models()
    assert "proxy" not in caught.value.message


@pytest.mark.parametrize(
    "target_of",
    [
        lambda addresses: addresses,
        lambda addresses: [", ".join(addresses[:2]), *addresses],
        ",".join,
        ", ".join,
        lambda addresses: f"ipv4:{','.join(addresses)}",
        lambda addresses: [f"ipv4:{','.join(addresses[:2])}", f"dns:///{addresses[2]}"],
    ],
)
async def test_calls_take_turns(start: Start, target_of: Callable[[list[str]], str | list[str]]) -> None:
    servers = [start(MODEL) for _ in range(3)]
    target = target_of([server.address for server in servers])
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


async def test_no_error_report_shows_a_secret() -> None:
    async with AsyncClient("unix:/nowhere", timeout=0.5, token=WORD, metadata=METADATA) as client:
        with pytest.raises((Unavailable, DeadlineExceeded)) as caught:
            await client.models()
    report = "".join(TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert "self = <unroll_client." in report
    assert not any(secret in report for secret in (WORD, METADATA[0][1]))


@pytest.mark.parametrize("token", ["two words", "line\n", "ä"])
def test_a_token_that_cannot_be_sent(token: str) -> None:
    with pytest.raises(ValueError, match="token: only visible ASCII characters") as caught:
        Client("a:1", token=token)
    assert token not in str(caught.value)
