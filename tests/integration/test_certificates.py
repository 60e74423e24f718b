"""Callers identified by certificates, and the admin listener over TLS."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from support import wire
from support.certificates import Authority, Files, channel
from support.operators import admin_address, bearer, write_identities
from support.processes import PATIENCE, ServerProcess

from unroll_proto.v1 import admin_pb2 as admin
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.admin_pb2_grpc import AdminServiceStub

STEPS = np.zeros((3, 12), np.float32)
AUTHORITY, CALLERS = Authority(), Authority()
ALICE, BOB = CALLERS.issue("alice.test"), CALLERS.issue("bob.test")
CAROL = CALLERS.issue(common_name="carol")
DAVE = CALLERS.issue("dave@mail.test", "dave.test")


@pytest.fixture(scope="module", params=["1", "2"])
def process(
    bundle_root: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[ServerProcess]:
    """A server that requires certificates but no tokens."""
    folder = tmp_path_factory.mktemp("mutual")
    options = [*Files(folder, AUTHORITY, CALLERS).options, "--access-log", "--admin", "127.0.0.1:0"]
    with ServerProcess(bundle_root, folder / "log", *options, "--workers", request.param) as process:
        yield process
        assert process.stop() == 0, process.log


def advance(session: str, start: bool = False) -> pb.AdvanceRequest:
    return pb.AdvanceRequest(session_id=session, model="jv", values=wire.to_bytes(STEPS), start=start)


async def test_a_session_belongs_to_who_the_certificate_names(process: ServerProcess) -> None:
    callers = {"alice.test": ALICE, "bob.test": BOB, "carol": CAROL, "dave@mail.test": DAVE}
    for name, own in callers.items():
        async with channel(process.address, AUTHORITY, own) as mine:
            stub = wire.stub_of(mine)
            assert (await stub.Advance(advance(name, start=True), timeout=PATIENCE)).step == 3
            assert (await stub.Advance(advance(name), timeout=PATIENCE)).step == 6
    async with channel(process.address, AUTHORITY, BOB) as bob:
        # A self-signed certificate does not count.
        claim = (("x-forwarded-client-cert", 'Subject="CN=alice.test";DNS=alice.test'),)
        for metadata in ((), claim):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await wire.stub_of(bob).Advance(advance("alice.test"), metadata=metadata, timeout=PATIENCE)
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    async with channel(admin_address(process), AUTHORITY, ALICE) as operator:
        listed = await AdminServiceStub(operator).ListSessions(admin.ListSessionsRequest(), timeout=PATIENCE)
    assert {(each.owner, each.session_id) for each in listed.sessions} == {(name, name) for name in callers}
    for name in callers:
        assert f"identity={name}" in process.log


async def test_a_stream_is_of_who_the_certificate_names(process: ServerProcess) -> None:
    async with channel(process.address, AUTHORITY, ALICE) as alice:
        requests = [wire.open_request("a"), wire.chunk_request("a", 0, STEPS)]
        answers = await wire.exchange(wire.stub_of(alice), requests)
    assert sum(each.count for each in wire.steps_of(answers, "a")) == 3
    assert not any(answer.HasField("error") for answer in answers)


async def test_the_admin_listener_lets_in_who_has_a_certificate(process: ServerProcess) -> None:
    address = admin_address(process)
    async with channel(address, AUTHORITY, ALICE) as operator:
        versions = await AdminServiceStub(operator).ListVersions(admin.ListVersionsRequest(), timeout=PATIENCE)
        assert [each.model for each in versions.versions] == ["jv"]
    for stranger in (
        channel(address, AUTHORITY),
        channel(address, AUTHORITY, Authority().issue("alice.test")),
        grpc.aio.insecure_channel(address),
    ):
        async with stranger:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await AdminServiceStub(stranger).ListVersions(admin.ListVersionsRequest(), timeout=PATIENCE)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_with_tokens_and_certificates_an_admin_needs_the_right(bundle_root: Path, tmp_path: Path) -> None:
    identities = write_identities(tmp_path / "identities.toml", root={"admin": True}, **{'"bob.test"': {}})
    options = [*Files(tmp_path / "tls", AUTHORITY, CALLERS).options, "--tokens", str(identities)]
    with ServerProcess(bundle_root, tmp_path / "log", *options, "--admin", "127.0.0.1:0") as process:
        async with channel(admin_address(process), AUTHORITY, BOB) as bob:
            stub = AdminServiceStub(bob)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.ListVersions(admin.ListVersionsRequest(), timeout=PATIENCE)
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
            await stub.ListVersions(admin.ListVersionsRequest(), metadata=bearer("TOKEN-root"), timeout=PATIENCE)
        assert process.stop() == 0, process.log
