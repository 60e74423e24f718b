"""docker-compose.yml on a real engine: trains, serves, balances, loses a replica, drains, with the same bits."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.compose import REPOSITORY, Array, Deployment, compose_command, inspect, output_of, received_by
from support.eager import TOLERANCE
from support.waiting import wait_until
from support.web import ask

from unroll_client import Client, ServerDraining, Snapshot
from unroll_export import SimpleRNN
from unroll_proto.bundle import MANIFEST, WEIGHTS, verify_bundle
from unroll_proto.sequences import Sequence

pytestmark = pytest.mark.compose

REPEATS = 24

INSIDE = """
import importlib.util, json, os, pathlib, shutil
def writable(path):
    try:
        pathlib.Path(path, "probe").touch()
    except OSError:
        return False
    return True
print(json.dumps({
    "uid": os.getuid(),
    "capabilities": int(pathlib.Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16),
    "writable": [path for path in ("/", "/opt/unroll", "/models", "/tmp") if writable(path)],
    "modules": [name for name in ("torch", "unroll_export") if importlib.util.find_spec(name)],
    "compilers": [name for name in ("cc", "gcc", "clang") if shutil.which(name)],
}))
"""


def states_of(address: str, values: Array, snapshot: Snapshot | None = None) -> Array:
    """Returns the hidden states [steps, hidden_size] of a new stream."""
    with Client(address, model="jv") as client, client.unroll(snapshot=snapshot) as stream:
        states = stream.send(values).states
    assert states is not None
    return states


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    data = tmp_path_factory.mktemp("data")
    if os.geteuid() == 0:
        # Not root's, so that the owner of the client's output can be checked.
        os.chown(data, 4321, 4321)
    deployment = Deployment(compose_command(), data)
    try:
        deployment.compose("build", "train", "server", "gateway", "client", "web")
        deployment.up()
        yield deployment
    finally:
        deployment.down()


@pytest.fixture(scope="module")
def values(vowels: list[Sequence]) -> list[Array]:
    return [sequence.values for sequence in vowels]


@pytest.fixture(scope="module")
def file(deployment: Deployment, values: list[Array]) -> str:
    """Writes a file of `data` with every sequence REPEATS times: enough calls for all replicas."""
    name = "sequences.npz"
    lengths = np.array([len(sequence) for sequence in values] * REPEATS)
    np.savez(deployment.data / name, values=np.concatenate(values * REPEATS), lengths=lengths)
    return name


@pytest.fixture(scope="module")
def served(deployment: Deployment, values: list[Array]) -> Array:
    """Returns the logits [sequences, classes] of one call, through the published port."""
    deployment.up()
    with Client(deployment.address, model="jv") as client:
        return client.classify(values).logits


@pytest.fixture(scope="module")
def bundle(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies the served bundle out of its volume."""
    path = tmp_path_factory.mktemp("bundle") / "1"
    output_of("docker", "cp", f"{deployment.container('train')}:/models/jv/1", path)
    return path


def test_serves_what_eager_pytorch_computes(
    bundle: Path, served: Array, deployment: Deployment, vowels: list[Sequence]
) -> None:
    manifest, _ = verify_bundle(bundle)
    network = SimpleRNN(manifest.input_size, manifest.hidden_size, manifest.output_size, manifest.num_layers)
    network.load_state_dict(load_file(bundle / WEIGHTS))
    network.eval()
    with torch.inference_mode():
        eager = np.concatenate([network(torch.from_numpy(sequence.values)[None]).numpy() for sequence in vowels])
    assert np.abs(served - eager).max() <= TOLERANCE
    with Client(deployment.address, model="jv") as client:
        labels = client.classify([sequence.values for sequence in vowels]).labels
    assert labels == [manifest.class_labels[index] for index in eager.argmax(axis=1)]
    accuracy = np.mean([label == sequence.label for label, sequence in zip(labels, vowels, strict=True)])
    assert accuracy > 0.95


def test_the_server_has_nothing_that_it_does_not_need(deployment: Deployment) -> None:
    deployment.up()
    server, train = deployment.container("server"), deployment.container("train")
    inside = json.loads(output_of("docker", "exec", server, "python", "-c", INSIDE))
    assert inside == {"uid": 10001, "capabilities": 0, "writable": [], "modules": [], "compilers": []}
    assert (
        inspect(server, "{{.HostConfig.ReadonlyRootfs}} {{.HostConfig.SecurityOpt}}") == "true [no-new-privileges:true]"
    )
    assert inspect(server, "{{.HostConfig.RestartPolicy.Name}}") == "unless-stopped"
    assert int(inspect(server, "{{.HostConfig.Memory}}")) > 0
    sizes = [int(inspect(inspect(container, "{{.Image}}"), "{{.Size}}")) for container in (server, train)]
    assert sizes[1] - sizes[0] > 500e6, "torch alone takes more than that"


@pytest.mark.parametrize(
    ("service", "holds"),
    [
        ("server", "pkg:pypi/onnxruntime@"),
        ("train", "pkg:pypi/torch@"),
        ("gateway", "pkg:deb/debian/haproxy@"),
        ("web", "pkg:pypi/uvicorn@"),
    ],
)
def test_an_image_says_what_is_in_it(deployment: Deployment, service: str, holds: str) -> None:
    deployment.up()
    image = inspect(deployment.container(service), "{{.Image}}")
    labels = json.loads(inspect(image, "{{json .Config.Labels}}"))
    assert labels["org.opencontainers.image.title"] == f"unroll-{service}"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    read = ("docker", "run", "--rm", "--entrypoint", "cat", image)
    sbom = json.loads(output_of(*read, "/usr/share/doc/unroll/sbom.cdx.json"))
    top = sbom["metadata"]["component"]
    assert (top["name"], top["version"]) == (f"unroll-{service}", labels["org.opencontainers.image.version"])
    found = {component["purl"].partition("@")[0] + "@": component for component in sbom["components"]}
    assert found.keys() >= {holds, "pkg:generic/cpython@", "pkg:deb/debian/libssl3@"}
    assert all("licenses" in component for component in found.values() if component["purl"].startswith("pkg:pypi"))
    assert output_of(*read, "/usr/share/doc/unroll/NOTICE") == (REPOSITORY / "NOTICE").read_text()


def test_what_is_trained_stays(deployment: Deployment, bundle: Path) -> None:
    deployment.compose("down")
    deployment.up()
    train = deployment.container("train")
    assert inspect(train, "{{.State.ExitCode}}") == "0"
    assert "/models/jv/1 is there already" in output_of("docker", "logs", train)
    manifest = output_of("docker", "exec", deployment.container("server"), "cat", "/models/jv/1/manifest.json")
    assert manifest == (bundle / MANIFEST).read_text()
    assert output_of("docker", "exec", deployment.container("server"), "ls", "/models/jv").split() == ["1"]


def test_the_client_container_classifies_a_file(deployment: Deployment, file: str, served: Array) -> None:
    logits = deployment.classify_in_container(file)
    assert logits.tobytes() == np.tile(served, (REPEATS, 1)).tobytes()
    owner = deployment.data.stat()
    output = (deployment.data / "out.parquet").stat()
    assert (output.st_uid, output.st_gid) == (owner.st_uid, owner.st_gid)


def test_the_web_service_gives_the_same_bits_and_keeps_to_itself(
    deployment: Deployment, values: list[Array], served: Array
) -> None:
    deployment.up()
    wait_until(lambda: inspect(deployment.container("web"), "{{.State.Health.Status}}") == "healthy")
    answer = ask(deployment.web, "/v1/models/jv:classify", {"sequences": [value.tolist() for value in values]})
    logits = np.array([row["logits"] for row in answer.json["results"]], np.float32)
    assert logits.tobytes() == served.tobytes()
    assert ask(deployment.web, "/v1/models", headers={"host": "evil.example"}).status == 421
    inside = json.loads(output_of("docker", "exec", deployment.container("web"), "python", "-c", INSIDE))
    assert inside == {"uid": 10001, "capabilities": 0, "writable": [], "modules": [], "compilers": []}


def test_replicas_share_the_calls_and_give_the_same_bits(
    deployment: Deployment, file: str, values: list[Array], served: Array
) -> None:
    deployment.up(replicas=2)
    replicas = deployment.live_replicas()
    sent = (deployment.data / file).stat().st_size

    before = [received_by(replica) for replica in replicas]
    logits = deployment.classify_in_container(file)
    between = [received_by(replica) for replica in replicas]
    assert logits.tobytes() == np.tile(served, (REPEATS, 1)).tobytes()
    assert min(np.subtract(between, before)) > sent / 8, "the client's container balances by DNS"

    with Client(deployment.address, model="jv") as client:
        for _ in range(REPEATS):
            assert client.classify(values).logits.tobytes() == served.tobytes()
        one_by_one = np.concatenate([client.classify([sequence]).logits for sequence in values])
    after = [received_by(replica) for replica in replicas]
    assert one_by_one.tobytes() == served.tobytes()
    assert min(np.subtract(after, between)) > sent / 8, "the gateway balances too"


@pytest.mark.parametrize("fault", ["killed", "cut off"])
def test_calls_go_on_when_a_replica_is_lost(
    deployment: Deployment, file: str, values: list[Array], served: Array, fault: str
) -> None:
    deployment.up(replicas=2)
    lost, left = deployment.live_replicas()
    with Client(deployment.address, model="jv") as client:
        client.classify(values)
        if fault == "killed":
            output_of("docker", "kill", lost)
        else:
            # Nothing is closed: packets to it are dropped.
            network = inspect(left, "{{range $name, $_ := .NetworkSettings.Networks}}{{$name}}{{end}}")
            output_of("docker", "network", "disconnect", network, lost)
        for _ in range(50):
            assert client.classify(values[:20]).logits.tobytes() == served[:20].tobytes()
    assert deployment.classify_in_container(file).tobytes() == np.tile(served, (REPEATS, 1)).tobytes()
    output_of("docker", "rm", "--force", lost)
    assert deployment.live_replicas() == [left]


def test_sigterm_drains_a_replica_and_its_streams_go_on_elsewhere(deployment: Deployment, values: list[Array]) -> None:
    deployment.up(replicas=2)
    sequence = max(values, key=len)
    expected = states_of(deployment.address, sequence)
    # A client has one connection, and the gateway spreads streams over the replicas.
    clients = [Client(deployment.address, model="jv", reconnect_timeout=0) for _ in range(4)]
    try:
        streams = [client.unroll() for client in clients]
        starts = [stream.send(sequence[:5]).states for stream in streams]
        stopped = deployment.live_replicas()[0]
        output_of("docker", "stop", "--time", "60", stopped)
        assert inspect(stopped, "{{.State.ExitCode}}") == "0"
        moved = 0
        for stream, start in zip(streams, starts, strict=True):
            try:
                rest = stream.send(sequence[5:]).states
            except ServerDraining as drained:
                moved += 1
                rest = states_of(deployment.address, sequence[5:], drained.snapshot)
            assert start is not None
            assert rest is not None
            assert np.concatenate([start, rest]).tobytes() == expected.tobytes()
        assert 0 < moved < len(clients)
    finally:
        for client in clients:
            client.close()


def test_a_stop_of_everything_gives_streams_back(deployment: Deployment, values: list[Array]) -> None:
    deployment.up()
    sequence = max(values, key=len)
    expected = states_of(deployment.address, sequence)
    with Client(deployment.address, model="jv", reconnect_timeout=0) as client:
        stream = client.unroll()
        stream.send(sequence[:5])
        deployment.compose("stop")
        with pytest.raises(ServerDraining) as drained:
            stream.send(sequence[5:])
    assert inspect(deployment.container("server"), "{{.State.ExitCode}}") == "0"
    assert inspect(deployment.container("gateway"), "{{.State.ExitCode}}") == "0"
    deployment.up()
    rest = states_of(deployment.address, sequence[5:], drained.value.snapshot)
    assert rest.tobytes() == expected[5:].tobytes()
