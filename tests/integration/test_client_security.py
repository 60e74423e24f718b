"""The client library and its commands with TLS, mutual TLS and tokens, against a real server."""

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.certificates import Authority, Files
from support.operators import write_identities
from support.processes import ServerProcess, run

from unroll_client import Client, Unauthenticated, Unavailable

ALICE, NOBODY = "TOKEN-alice", "TOKEN-nobody"


class Guarded:
    """A server that requires a certificate and a token, and the credentials of a caller.

    Attributes:
        process: The server.
        authority: PEM of the authority of its certificate.
        certificate: A caller's chain and key.
        folder: Folder with the same as files: ca.pem, caller.pem, caller.key, token.
        metrics: HOST:PORT of its metrics.
    """

    def __init__(
        self, process: ServerProcess, authority: bytes, certificate: tuple[bytes, bytes], folder: Path
    ) -> None:
        self.process = process
        self.authority = authority
        self.certificate = certificate
        self.folder = folder
        (self.metrics,) = re.findall(r"metrics on http://(\S+)/metrics", process.log)
        (folder / "ca.pem").write_bytes(authority)
        (folder / "caller.pem").write_bytes(certificate[0])
        (folder / "caller.key").write_bytes(certificate[1])
        (folder / "token").write_text(f"{ALICE}\n")


@pytest.fixture(scope="module")
def guarded(bundle_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    authority, callers = Authority(), Authority()
    options = Files(folder / "tls", authority, callers).options
    options += ["--metrics", "127.0.0.1:0", "--tokens", str(write_identities(folder / "tokens.toml", alice={}))]
    with ServerProcess(bundle_root, folder / "log", *options) as process:
        yield Guarded(process, authority.pem, callers.issue("caller"), folder)
        assert process.stop() == 0, process.log


def test_who_is_known_is_served(guarded: Guarded) -> None:
    values = np.ones((5, 12), np.float32)
    with Client(
        guarded.process.address,
        root_certificates=guarded.authority,
        certificate=guarded.certificate,
        token=ALICE,
    ) as client:
        assert client.classify([values]).labels
        with client.unroll() as sequence:
            assert sequence.send(values).count == 5


def test_the_name_in_the_certificate_can_be_another(guarded: Guarded) -> None:
    options: dict[str, Any] = {
        "root_certificates": guarded.authority,
        "certificate": guarded.certificate,
        "token": ALICE,
    }
    with Client(guarded.process.address, server_name="localhost", **options) as client:
        assert client.models()
    with (
        Client(guarded.process.address, server_name="elsewhere", **options) as client,
        pytest.raises(Unavailable, match="certificate has another name: give it as server_name"),
    ):
        client.models()


def test_who_is_not_known_is_told(guarded: Guarded) -> None:
    address, authority, certificate = guarded.process.address, guarded.authority, guarded.certificate
    with Client(address, root_certificates=authority, certificate=certificate, token=NOBODY) as client:
        with pytest.raises(Unauthenticated):
            client.models()
        with pytest.raises(Unauthenticated):
            client.unroll()
    with Client(address, root_certificates=authority, token=ALICE) as client, pytest.raises(Unavailable):
        client.models()
    with Client(address, tls=True, certificate=certificate) as client, pytest.raises(Unavailable):
        client.models()


class Web(BaseHTTPRequestHandler):
    """A server of HTTP/1.1 without content."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


@pytest.mark.parametrize(
    ("at", "tls", "hint"),
    [
        ("serve", True, "(not|it) speak TLS"),
        ("guarded", False, "the server closed the connection at once: does it speak TLS"),
        ("guarded", True, "certificate is not trusted: give the authority"),
        ("web", False, "no gRPC server is there: an HTTP/1.1 one, such as the port of --metrics"),
        ("metrics", False, "no gRPC server is there: an HTTP/1.1 one, such as the port of --metrics"),
    ],
)
def test_the_wrong_protocol_is_named(guarded: Guarded, server: ServerProcess, at: str, tls: bool, hint: str) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Web) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        addresses = {
            "serve": server.address,
            "guarded": guarded.process.address,
            "metrics": guarded.metrics,
            "web": f"127.0.0.1:{web.server_port}",
        }
        with Client(addresses[at], tls=tls) as client, pytest.raises(Unavailable, match=hint):
            client.models()
        web.shutdown()


def test_commands(guarded: Guarded) -> None:
    folder = guarded.folder
    base: list[str | Path] = ["--server", guarded.process.address, "--ca", folder / "ca.pem"]
    base += ["--cert", folder / "caller.pem", "--key", folder / "caller.key"]
    assert "jv" in run("unroll", "models", *base, "--token-file", folder / "token").stdout
    done = run("unroll-bench", *base, "--token-file", folder / "token", "--closed", "2", "--seconds", "0.3")
    assert "TOKEN" not in done.stdout + done.stderr
    assert "jv" in run("unroll", "models", *base, env={"UNROLL_TOKEN": ALICE}).stdout
    refused = run("unroll", "models", *base, env={"UNROLL_TOKEN": NOBODY}, check=False)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert ALICE not in guarded.process.log
