"""TLS and mutual TLS: admission, and certificates that change while streams are open."""

import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from support import wire
from support.certificates import Authority, Files, channel, fingerprint, replace, shown_by, unusable
from support.processes import PATIENCE, ServerProcess, run
from support.transports import BOTH
from support.waiting import until, wait_until

from unroll_proto.v1 import unroll_pb2 as pb

pytestmark = BOTH


@pytest.fixture(scope="module")
def authority() -> Authority:
    """Authority of the servers' certificates."""
    return Authority()


@pytest.fixture(scope="module")
def callers() -> Authority:
    """Authority of the callers' certificates."""
    return Authority()


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> Files:
    return Files(tmp_path / "tls", authority)


@pytest.fixture
def process(bundle_root: Path, tmp_path: Path, files: Files) -> Iterator[ServerProcess]:
    """A server with TLS that requires no certificates of callers."""
    with ServerProcess(bundle_root, tmp_path / "log", *files.options) as process:
        yield process
        assert process.stop() == 0, process.log


async def answers(channel: grpc.aio.Channel) -> bool:
    """Returns True if a call succeeds; closes the channel."""
    async with channel:
        try:
            await wire.stub_of(channel).GetModel(pb.GetModelRequest(model="jv"), timeout=PATIENCE)
        except grpc.aio.AioRpcError as error:
            return error.code() != grpc.StatusCode.UNAVAILABLE
    return True


async def test_who_speaks_tls_and_trusts_the_server_is_let_in(
    process: ServerProcess, authority: Authority, callers: Authority
) -> None:
    assert await answers(channel(process.address, authority))
    assert await answers(channel(process.address, authority, callers.issue("anybody.test")))
    assert not await answers(grpc.aio.insecure_channel(process.address))
    assert not await answers(channel(process.address, callers))


async def test_mutual_tls_lets_in_only_who_has_a_certificate(
    bundle_root: Path, tmp_path: Path, authority: Authority, callers: Authority
) -> None:
    files = Files(tmp_path / "tls", authority, callers)
    other = Authority()
    with ServerProcess(bundle_root, tmp_path / "log", *files.options) as process:
        alice = callers.issue("alice.test")
        assert await answers(channel(process.address, authority, alice))
        assert not await answers(channel(process.address, authority))
        assert not await answers(channel(process.address, authority, other.issue("alice.test")))
        # After a change of the authority, only callers of the new one are admitted.
        replace(files.client_ca, other.pem)
        bob = other.issue("bob.test")
        await until(lambda: answers(channel(process.address, authority, bob)), lambda: process.log)
        assert not await answers(channel(process.address, authority, alice))
        assert process.stop() == 0, process.log


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_renewed_certificate_is_shown_and_open_streams_live_on(
    workers: str, bundle_root: Path, tmp_path: Path, files: Files, authority: Authority
) -> None:
    options = [*files.options, "--workers", workers]
    with ServerProcess(bundle_root, tmp_path / "log", *options) as process:
        old = fingerprint(files.chain)
        assert shown_by(process.address) == old
        async with channel(process.address, authority) as open_channel:
            stream = wire.stub_of(open_channel).Unroll()
            await stream.write(wire.open_request("a"))
            opened: pb.UnrollResponse = await stream.read()  # type: ignore[assignment]  # or EOF
            assert opened.HasField("opened")
            files.renew(authority)
            renewed = fingerprint(files.chain)
            # With several workers each connection may reach another one.
            wait_until(lambda: all(shown_by(process.address) == renewed for _ in range(8)), lambda: process.log)
            await stream.write(wire.chunk_request("a", 0, np.zeros((3, 12), np.float32)))
            answer: pb.UnrollResponse = await stream.read()  # type: ignore[assignment]  # or EOF
            assert answer.steps.count == 3
            assert await answers(channel(process.address, authority))
        assert process.stop() == 0, process.log


async def test_files_that_are_no_good_leave_the_old_certificate_in_use(
    process: ServerProcess, files: Files, authority: Authority
) -> None:
    good = fingerprint(files.chain)
    other_chain, other_key = authority.issue("localhost")
    for path, content, says in (
        (files.chain, other_chain, "is not the key of the certificate"),
        (files.chain, b"no certificate", "--tls-cert: "),
        (files.key, b"no key", "still using the old certificates"),
    ):
        was, seen = path.read_bytes(), process.log.count("still using the old certificates")
        replace(path, content)

        def noticed(says: str = says, seen: int = seen) -> bool:
            # grpcio checks the files when a client connects.
            assert shown_by(process.address) == good
            log = process.log
            return log.count("still using the old certificates") > seen and says in log

        wait_until(noticed, lambda: process.log)
        assert "PRIVATE" not in process.log
        replace(path, was)
    files.key.unlink()
    wait_until(
        lambda: shown_by(process.address) == good and "key.pem: No such file" in process.log, lambda: process.log
    )
    replace(files.chain, other_chain)
    replace(files.key, other_key)
    wait_until(lambda: shown_by(process.address) == fingerprint(files.chain), lambda: process.log)


async def test_a_certificate_that_no_caller_could_use_leaves_the_old_one_in_use(
    process: ServerProcess, files: Files, authority: Authority
) -> None:
    good = fingerprint(files.chain)
    for path, content in zip((files.chain, files.key), unusable(), strict=True):
        replace(path, content)

    def noticed() -> bool:
        assert shown_by(process.address) == good
        return "is for a key that gRPC's clients can't use" in process.log

    wait_until(noticed, lambda: process.log)
    assert await answers(channel(process.address, authority))


async def test_certificates_may_have_text_of_any_encoding_beside_them(
    process: ServerProcess, files: Files, authority: Authority
) -> None:
    for text in (b"Subject: Caf\xe9\n", b"", "Subject: Café\n".encode()):
        chain, key = authority.issue("localhost", "127.0.0.1")
        replace(files.key, key)
        replace(files.chain, text + chain)
        renewed = fingerprint(files.chain)
        wait_until(lambda renewed=renewed: shown_by(process.address) == renewed, lambda: process.log)  # type: ignore[misc]
        assert await answers(channel(process.address, authority))


def test_a_bad_certificate_ends_the_start_with_one_line(
    bundle_root: Path, tmp_path: Path, files: Files, authority: Authority
) -> None:
    other, nothing = tmp_path / "other.pem", tmp_path / "nothing.pem"
    other.write_bytes(authority.issue("localhost")[1])
    nothing.write_bytes(b"")
    strange = tmp_path / "strange.pem"
    strange.write_bytes(b"\xef\xbb\xbf" + files.chain.read_bytes())
    curious, curious_key = tmp_path / "curious.pem", tmp_path / "curious.key"
    for path, content in zip((curious, curious_key), unusable(), strict=True):
        path.write_bytes(content)
    chain, key = str(files.chain), str(files.key)
    for options, says in (
        (["--tls-cert", chain], "--tls-cert: needs --tls-key too"),
        (["--tls-client-ca", chain], "--tls-client-ca: needs --tls-cert and --tls-key"),
        (["--tls-cert", chain, "--tls-key", str(other)], f"--tls-key: {other} is not the key of the certificate"),
        (["--tls-cert", chain, "--tls-key", chain], f"--tls-key: {chain} has no private key"),
        (["--tls-cert", key, "--tls-key", key], f"--tls-cert: {key} must be certificates"),
        (["--tls-cert", str(strange), "--tls-key", key], f"--tls-cert: {strange} must be certificates"),
        (["--tls-cert", str(curious), "--tls-key", str(curious_key)], f"--tls-cert: {curious} is for a key that"),
        (["--tls-cert", chain, "--tls-key", "/nowhere"], "/nowhere: No such file or directory"),
        ([*files.options, "--tls-client-ca", str(nothing)], f"--tls-client-ca: {nothing} must be certificates"),
    ):
        done = run("unroll-serve", "--models", bundle_root, *options, check=False)
        assert done.returncode == 2
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_the_health_check_speaks_tls_with_the_servers_own_settings(
    bundle_root: Path, tmp_path: Path, authority: Authority, callers: Authority
) -> None:
    def check(address: str, **env: Path) -> tuple[int, str]:
        found = {"UNROLL_" + name: str(value) for name, value in env.items()}
        done = run(Path(sys.executable).name, "-m", "unroll_server.healthcheck", address, check=False, env=found)
        return done.returncode, done.stdout + done.stderr

    mutual = Files(tmp_path / "mutual", authority, callers)
    own = tmp_path / "probe.pem", tmp_path / "probe.key"
    for path, content in zip(own, callers.issue("probe.test"), strict=True):
        path.write_bytes(content)
    servers = Files(tmp_path / "tls", authority)
    with ServerProcess(bundle_root, tmp_path / "log", *servers.options) as process:
        assert check(process.address, TLS_CERT=servers.chain, TLS_KEY=servers.key) == (
            0,
            f"{process.address}: SERVING\n",
        )
        file = tmp_path / "unroll.toml"
        file.write_text(f"tls_cert = '{servers.chain}'\ntls_key = '{servers.key}'\n")
        assert check(process.address, CONFIG=file)[0] == 0
        assert check(process.address, TLS_CERT=mutual.chain)[0] == 1
        assert check(process.address)[0] == 1
    with ServerProcess(bundle_root, tmp_path / "log", *mutual.options) as process:
        assert check(process.address, TLS_CERT=mutual.chain, TLS_KEY=mutual.key)[0] == 1
        probe = {"HEALTHCHECK_CERT": own[0], "HEALTHCHECK_KEY": own[1]}
        assert check(process.address, TLS_CERT=mutual.chain, TLS_KEY=mutual.key, **probe)[0] == 0
