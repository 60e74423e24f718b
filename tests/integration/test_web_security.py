"""Security of a real web process: other sites, hosts, bodies, paths, tokens, TLS, headers."""

import http.client
import json
import socket
import ssl
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from support.certificates import Authority, Files, fingerprint, shown_by
from support.operators import metrics_address, write_identities
from support.otlp import Receiver
from support.processes import PATIENCE, ServerProcess, WebProcess, run
from support.waiting import wait_until
from support.web import ask, connect

STEP = [[0.0] * 12]
CLASSIFY, INFER = "/v1/models/jv:classify", "/v2/models/jv/infer"
EVERY_KIND = ["/v1/models", "/nowhere", "/api", "/openapi.json", "/healthz", "/v1/models/no", "/v2/health/ready"]
SITE = "https://lab.example"


@pytest.fixture(scope="module")
def open_to_site(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebProcess]:
    log = tmp_path_factory.mktemp("site") / "log"
    options = ("--origin", SITE, "--host", "unroll.example", "--max-body-bytes", "4096")
    with WebProcess(server.address, log, *options) as process:
        yield process


def raw(url: str, data: bytes) -> bytes:
    """Sends bytes on a connection of their own; returns all that comes back until it is closed."""
    parts = urlsplit(url)
    with socket.create_connection((str(parts.hostname), parts.port or 0), PATIENCE) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("path", EVERY_KIND)
def test_every_answer_has_the_security_headers(web: WebProcess, path: str) -> None:
    answer = ask(web.address, path)
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert "server" not in answer.headers
    assert "access-control-allow-origin" not in answer.headers


def test_pages_of_other_sites_may_neither_call_nor_read(web: WebProcess) -> None:
    own = web.address.removeprefix("http://")
    for origin, status in ((SITE, 403), ("null", 403), (f"http://{own}", 200), (f"http://{own}.evil.example", 403)):
        answer = ask(web.address, CLASSIFY, {"sequences": [STEP]}, headers={"origin": origin})
        assert (answer.status, "access-control-allow-origin" in answer.headers) == (status, False), origin
    preflight = {"origin": SITE, "access-control-request-method": "POST"}
    answer = ask(web.address, CLASSIFY, method="OPTIONS", headers=preflight)
    assert answer.status == 405
    assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("path", ["/page/socket", "/nowhere"])
def test_pages_of_other_sites_open_no_websocket(web: WebProcess, path: str) -> None:
    host = urlsplit(web.address).netloc
    head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nOrigin: {SITE}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    head += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    assert raw(web.address, head.encode()).startswith(b"HTTP/1.1 403 ")


def test_a_site_that_is_allowed_calls_and_reads(open_to_site: WebProcess) -> None:
    preflight = {
        "origin": SITE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    allowed = ask(open_to_site.address, CLASSIFY, method="OPTIONS", headers=preflight)
    assert (allowed.status, allowed.headers["access-control-allow-origin"]) == (200, SITE)
    assert "access-control-allow-credentials" not in allowed.headers
    answer = ask(open_to_site.address, CLASSIFY, {"sequences": [STEP]}, headers={"origin": SITE})
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, SITE)
    other = {**preflight, "origin": "https://evil.example"}
    refused = ask(open_to_site.address, CLASSIFY, method="OPTIONS", headers=other)
    assert (refused.status, "access-control-allow-origin" in refused.headers) == (400, False)


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example", 421), ("localhost.evil:80", 421)],
)
def test_only_its_own_names_reach_it_on_loopback(web: WebProcess, host: str, status: int) -> None:
    assert ask(web.address, "/v1/models", headers={"host": host}).status == status


def test_a_name_is_added_by_an_option(open_to_site: WebProcess) -> None:
    assert ask(open_to_site.address, "/v1/models", headers={"host": "Unroll.example:8080"}).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/api.css/../../app.py",
        "/..%2f..%2fetc%2fpasswd",
        "/api.css%00.html",
        "//etc/passwd",
        "/v1/models/jv/",
        "/v1/models/..%2F..%2Fetc",
        "/v2/models/%2e%2e/config",
        "/assets/../routes.py",
        "/assets/..%2f..%2froutes.py",
    ],
)
def test_no_path_leads_to_other_files(web: WebProcess, path: str) -> None:
    host = urlsplit(web.address).netloc
    answer = raw(web.address, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"root:" not in answer
    assert b"import " not in answer


def test_a_body_over_the_limit_is_refused_before_it_is_read(open_to_site: WebProcess) -> None:
    host = urlsplit(open_to_site.address).netloc
    head = f"POST {INFER} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000000000000\r\n\r\n"
    assert raw(open_to_site.address, head.encode()).startswith(b"HTTP/1.1 413 ")


def test_a_body_without_a_length_is_cut_at_the_limit(open_to_site: WebProcess) -> None:
    connection = connect(open_to_site.address)
    connection.request("POST", CLASSIFY, iter([b" " * 1024] * 5), {"content-type": "application/json"})
    response = connection.getresponse()
    assert (response.status, response.headers.get_content_type()) == (413, "application/problem+json")
    assert b"--max-body-bytes" in response.read()
    connection.close()


@pytest.mark.parametrize(
    ("data", "status"),
    [(zlib.compress(bytes(50_000_000)), 413), (zlib.compress(b"{}" * 9)[:-6], 400), (b"not compressed", 400)],
)
def test_what_a_body_unpacks_to_is_bounded(web: WebProcess, data: bytes, status: int) -> None:
    assert ask(web.address, CLASSIFY, data, headers={"content-encoding": "deflate"}).status == status


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n b: c\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        bytes(range(256)) * 4 + b"\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused_and_others_are_served(web: WebProcess, data: bytes) -> None:
    answer = raw(web.address, data)
    assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4"))
    assert ask(web.address, "/healthz").status == 200


def test_tokens_ids_and_traces_go_through_and_errors_come_back(bundle_root: Path, tmp_path: Path) -> None:
    identities = write_identities(tmp_path / "identities.toml", alice={}, bob={"max_sessions": 1})
    with (
        Receiver() as receiver,
        ServerProcess(
            bundle_root,
            tmp_path / "server",
            *("--tokens", str(identities), "--access-log"),
            env=receiver.environment,
        ) as server,
        WebProcess(server.address, tmp_path / "web", env=receiver.environment) as web,
    ):

        def call(path: str, content: Any, token: str = "", **headers: str) -> Any:
            sent = {"authorization": token} if token else {}
            return ask(web.address, path, content, headers={**sent, **headers})

        for token in ("", "Bearer TOKEN-carol", "Basic TOKEN-alice", "Bearer"):
            for path, content in ((CLASSIFY, {"sequences": [STEP]}), ("/v1/models/jv:unroll", {"sequence": STEP})):
                answer = call(path, content, token)
                assert (answer.status, answer.json["code"]) == (401, "UNAUTHENTICATED")
                assert answer.headers["www-authenticate"] == "Bearer"
        assert call("/v2/health/ready", None).status == 200
        trace, caller = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
        named = {"x-request-id": "from-the-caller", "traceparent": f"00-{trace}-{caller}-01"}
        answer = call(CLASSIFY, {"sequences": [STEP]}, "Bearer TOKEN-alice", **named)
        assert (answer.status, answer.headers["x-request-id"]) == (200, "from-the-caller")
        assert call("/v1/models/jv:unroll", {"sequence": STEP}, "bearer TOKEN-alice").status == 200

        def chained(spans: list[tuple[str, Span]]) -> bool:
            """Returns True if the server's span is a child of the process's, which is the caller's child."""
            ours = [(name, span) for name, span in spans if span.trace_id.hex() == trace]
            middle = [span.span_id for name, span in ours if span.parent_span_id.hex() == caller]
            return any(name == "unroll-server" and span.parent_span_id in middle for name, span in ours)

        receiver.until(chained)
        # A refusal for a quota has its reason and the time to retry.
        tensor = {"name": "input", "datatype": "FP32", "shape": [1, 1, 12], "data": STEP}
        for number, status in ((1, 200), (2, 429)):
            parameters = {"sequence_id": number, "sequence_start": True}
            answer = call(INFER, {"inputs": [tensor], "parameters": parameters}, "Bearer TOKEN-bob")
            assert answer.status == status, answer.data
        assert (answer.json["code"], answer.json["reason"]) == ("RESOURCE_EXHAUSTED", "IDENTITY_LIMIT")
        assert int(answer.headers["retry-after"]) >= answer.json["retry_after"] > 0
        with WebProcess(server.address, tmp_path / "own", env={"UNROLL_TOKEN": "TOKEN-alice"}) as own:
            assert ask(own.address, "/v1/models").status == 200
            assert ask(own.address, "/v1/models", headers={"authorization": "Bearer TOKEN-carol"}).status == 401
            assert own.stop() == 0
        assert web.stop() == 0
        assert "request_id=from-the-caller" in server.log
        assert "request_id=from-the-caller" in web.log
        assert "TOKEN" not in web.log + own.log + server.log


def test_it_speaks_tls_and_calls_by_tls(bundle_root: Path, tmp_path: Path) -> None:
    authority = Authority()
    files = Files(tmp_path / "tls", authority)
    trusted = tmp_path / "ca.pem"
    trusted.write_bytes(authority.pem)
    with ServerProcess(bundle_root, tmp_path / "server", *files.options) as server:
        options = ("--tls-cert", str(files.chain), "--tls-key", str(files.key), "--ca", str(trusted))
        with WebProcess(server.address, tmp_path / "web", *options) as web:
            assert web.address.startswith("https://")
            answer = ask(web.address, "/v1/models", tls=ssl.create_default_context(cadata=authority.pem.decode()))
            assert answer.status == 200
            with pytest.raises(ssl.SSLCertVerificationError):
                ask(web.address, "/v1/models", tls=ssl.create_default_context())
            with pytest.raises(http.client.HTTPException):
                ask(web.address.replace("https", "http"), "/v1/models")
            files.key.write_text("half written")
            wait_until(lambda: "the certificate was not renewed" in web.log, lambda: web.log)
            files.renew(authority)
            wait_until(lambda: shown_by(urlsplit(web.address).netloc) == fingerprint(files.chain), lambda: web.log)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--listen", "nowhere"), "--listen: HOST:PORT expected"),
        (("--listen", "192.0.2.1:0"), "--listen: 192.0.2.1:0: "),
        (("--tls-cert", "x.pem"), "--tls-cert, --tls-key: one needs the other"),
        (("--tls-cert", "x.pem", "--tls-key", "x.pem"), "--tls-cert, --tls-key: "),
        (("--origin", "lab.example"), "--origin: https://HOST[:PORT] expected"),
        (("--server", "nowhere"), "--server: HOST:PORT or unix:/PATH expected"),
    ],
)
def test_a_wrong_option_is_one_line(options: tuple[str, ...], part: str) -> None:
    done = run("unroll", "web", "--listen", "127.0.0.1:0", *options, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert part in done.stderr


def test_who_leaves_a_stream_leaves_nothing_behind(bundle_root: Path, tmp_path: Path) -> None:
    content = json.dumps({"sequence": np.zeros((20_000, 12)).tolist()})
    with (
        ServerProcess(bundle_root, tmp_path / "server", "--metrics", "127.0.0.1:0") as server,
        WebProcess(server.address, tmp_path / "web") as web,
    ):

        def open_sequences() -> float:
            lines = ask(f"http://{metrics_address(server)}", "/metrics").data.decode().splitlines()
            return sum(float(line.split()[-1]) for line in lines if line.startswith("unroll_open_sequences{"))

        for _ in range(3):
            connection = connect(web.address)
            connection.request("POST", "/v1/models/jv:unroll", content, {"content-type": "application/json"})
            connection.getresponse().readline()
            connection.close()
        wait_until(lambda: not open_sequences(), lambda: web.log)
        assert web.stop() == 0
