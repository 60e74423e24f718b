"""The page's WebSocket and HTTP API, on a real server: bits, refusals, limits."""

import base64
import gzip
import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.processes import ServerProcess, WebProcess
from support.values import random_values
from support.web import ask
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from unroll_client import Client


@pytest.fixture
def socket(web: WebProcess) -> Iterator[ClientConnection]:
    with connect(f"{web.address.replace('http', 'ws')}/page/socket", proxy=None) as connection:
        yield connection


def read(connection: ClientConnection) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Returns the next frame: its header, and its arrays by name."""
    data = connection.recv(timeout=60)
    assert isinstance(data, bytes)
    (size,) = struct.unpack_from("<I", data)
    header = json.loads(data[4 : 4 + size])
    arrays, offset = {}, 4 + size
    for name, shape in header["arrays"]:
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(data, "<f4", count, offset).reshape(shape)
        offset += 4 * count
    assert offset == len(data)
    return header, arrays


def say(connection: ClientConnection, **request: Any) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    connection.send(json.dumps(request))
    return read(connection)


def packed(values: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def test_a_long_run_has_the_servers_bits_and_any_step_of_its_whole_state(
    socket: ClientConnection, server: ServerProcess
) -> None:
    values = random_values(3000, features=12)
    header, arrays = say(socket, op="open", run="a", model="jv", id=1)
    assert (header["event"], header["step"], header["id"]) == ("opened", 0, 1)
    assert not arrays["initial"].any()
    parts: list[dict[str, np.ndarray[Any, Any]]] = []
    header, arrays = say(socket, op="advance", run="a", values=packed(values), id=2)
    while header["event"] == "steps":
        assert header["first"] == sum(len(part["states"]) for part in parts)
        parts.append(arrays)
        header, arrays = read(socket)
    assert (header["event"], header["step"]) == ("done", 3000)
    with Client(server.address) as client, client.unroll("jv", logits=True) as sequence:
        steps = sequence.send(values)
        expected = client.classify([values], model="jv").probabilities[0]
    for name, whole in (("states", steps.states), ("logits", steps.logits)):
        assert whole is not None
        assert np.concatenate([part[name] for part in parts]).tobytes() == whole.tobytes()
    assert parts[-1]["probabilities"][-1].tobytes() == expected.tobytes()
    assert sum(len(part["blocks"]) for part in parts if "blocks" in part) == 1024
    header, arrays = say(socket, op="blocks", run="a", step=2345, id=3)
    assert steps.states is not None
    assert arrays["blocks"].tobytes() == steps.states[2343:2345].tobytes()


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        ("no JSON", "op: one of open, advance"),
        ("[" * 100_000, "op: one of open"),
        ({}, "op: one of open"),
        ({"op": ["open"]}, "op: one of open"),
        ({"op": "open", "run": "b", "model": 3}, "model: a string"),
        ({"op": "open", "run": "b", "model": "nowhere"}, "nowhere"),
        ({"op": "open", "run": "b", "model": "../../etc"}, "etc"),
        ({"op": "open", "run": "b", "model": "jv", "version": 1e9}, "version: a whole number"),
        ({"op": "open", "run": "b", "from": "c", "step": 0}, "run: 'c' is not open"),
        ({"op": "open", "run": "b", "from": "a", "step": 9}, "step: 9, the run has 0 to 0"),
        ({"op": "advance", "run": "a", "values": 5}, "values: base64"),
        ({"op": "advance", "run": "a", "values": "%"}, "values: not base64"),
        ({"op": "advance", "run": "a", "values": "AAAA"}, "a multiple of 48 expected"),
        ({"op": "advance", "run": "a", "values": packed(np.full((1, 12), np.nan))}, "a finite number"),
        ({"op": "arithmetic", "run": "a", "step": 0, "layer": 0, "unit": 0}, "unroll web --models DIR"),
        ({"op": "analysis", "run": "a", "step": 0, "factor": 1e9}, "factor: a number of at most 10"),
        ({"op": "moments", "run": "a", "unit": 0, "source": "none"}, "source: 'none' is unknown"),
        ({"op": "export", "run": "a", "kind": "exe"}, "kind: 'exe'"),
    ],
)
def test_what_can_not_be_answered_is_refused_and_the_run_goes_on(
    socket: ClientConnection, request_: Any, problem: str
) -> None:
    say(socket, op="open", run="a", model="jv")
    socket.send(request_ if isinstance(request_, str) else json.dumps(request_))
    header, _ = read(socket)
    assert header["event"] in ("error", "no_weights")
    assert problem in header["message"]
    header, _ = say(socket, op="advance", run="a", values=packed(np.zeros((1, 12))))
    assert header["event"] == "steps"


def test_a_page_has_four_runs_at_most_and_sends_no_bytes(socket: ClientConnection) -> None:
    for name in "abcd":
        assert say(socket, op="open", run=name, model="jv")[0]["event"] == "opened"
    assert say(socket, op="open", run="e", model="jv")[0]["message"] == "run: 4 at most"
    socket.send(b"bytes")
    with pytest.raises(ConnectionClosed):
        socket.recv(timeout=60)


def test_pages_of_other_sites_get_no_socket(web: WebProcess) -> None:
    with pytest.raises(InvalidStatus) as refused:
        connect(f"{web.address.replace('http', 'ws')}/page/socket", origin=Origin("https://evil.example"), proxy=None)
    assert refused.value.response.status_code == 403


@pytest.mark.parametrize(
    "path", ["/assets/../index.html", "/assets/%2e%2e/%2e%2e/routes.py", "/assets/..%2findex.html"]
)
def test_only_built_files_are_served(web: WebProcess, path: str) -> None:
    assert ask(web.address, path).status == 404


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("x.exe", b"", "x.exe: a file of kind .parquet"),
        ("x.jsonl", b'{"sequence": [[1], ["a"]]}', "x.jsonl: row 1"),
        ("../../x.npz", b"PK", "x.npz"),
    ],
)
def test_files_that_can_not_be_read_are_named(web: WebProcess, name: str, content: bytes, problem: str) -> None:
    answer = ask(web.address, f"/page/api/import?name={name}", content)
    assert answer.status == 400
    assert problem in answer.json["detail"]
    assert "unroll-page" not in answer.data.decode()  # the temporary folder


def test_a_compressed_table_is_imported(web: WebProcess) -> None:
    table = gzip.compress(b"id,time,x,y\na,0,0.5,1.5\na,1,2.5,3.5\n")
    answer = ask(web.address, "/page/api/import?name=steps.CSV.gz", table)
    assert answer.status == 200, answer.data
    (row,) = answer.json["sequences"]
    assert np.frombuffer(base64.b64decode(row["values"]), "<f4").tolist() == [0.5, 1.5, 2.5, 3.5]
