"""The distributions in fresh environments: dependencies, exclusions, and independent operation."""

import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.processes import ServerProcess, WebProcess, run
from support.web import ask

from unroll_client import Client
from unroll_proto.sequences import Sequence, write_sequences

pytestmark = pytest.mark.packaging

REPOSITORY = Path(__file__).parents[2]
DISTRIBUTIONS = sorted(file.parent.name for file in REPOSITORY.glob("*/pyproject.toml"))
COMMANDS = {
    command: f"unroll-{name}"
    for name in DISTRIBUTIONS
    for command in tomllib.loads((REPOSITORY / name / "pyproject.toml").read_text())["project"].get("scripts", {})
}
NGHTTP2 = Path("/usr/include/nghttp2/nghttp2.h").exists()
OURS = {f"unroll-{name}" for name in DISTRIBUTIONS}

INSTALLED = """
import importlib.metadata, json
print(json.dumps({each.name: each.version for each in importlib.metadata.distributions()}))
"""

IMPORT_ALL = """
import importlib, json, pkgutil, sys
package = importlib.import_module(sys.argv[1])
failed = {}
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        failed[module.name] = error.name
print(json.dumps(failed))
"""


def finished(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a command isolated from the tests' environment."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)


def output_of(*command: str | Path) -> str:
    done = finished(*command)
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass(frozen=True)
class Environment:
    """A virtual environment with some of the distributions."""

    bin: Path

    @classmethod
    def make(cls, path: Path, *wheels: Path) -> "Environment":
        """Installs wheels, and from the registry what they need."""
        output_of(sys.executable, "-m", "venv", path)
        output_of(
            path / "bin" / "pip", "install", "--quiet", "--no-compile", "-c", REPOSITORY / "constraints.txt", *wheels
        )
        return cls(path / "bin")

    def installed(self) -> dict[str, str]:
        """Returns the version of every distribution except pip and setuptools."""
        found: dict[str, str] = json.loads(output_of(self.bin / "python", "-c", INSTALLED))
        return {canonical(name): version for name, version in found.items() if name not in ("pip", "setuptools")}

    def import_failures(self, package: str) -> dict[str, str]:
        """Returns the modules of a package that can't be imported, with the missing module."""
        failures: dict[str, str] = json.loads(output_of(self.bin / "python", "-c", IMPORT_ALL, package))
        return failures

    def megabytes(self) -> float:
        """Returns the size of all files except those of pip and setuptools; bytecode is not compiled."""
        (site,) = self.bin.parent.glob("lib/python3*/site-packages")
        folders = [each for each in site.iterdir() if not each.name.startswith(("pip", "setuptools", "pkg_resources"))]
        return sum(file.lstat().st_size for folder in folders for file in (folder, *folder.rglob("*"))) / 2**20


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    sources = [REPOSITORY / name for name in DISTRIBUTIONS]
    output_of(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, *sources)
    return {wheel.name.split("-")[0]: wheel for wheel in folder.iterdir()}


@pytest.fixture(scope="module")
def client_environment(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    parts = [wheels[f"unroll_{name}"] for name in ("proto", "client")]
    return Environment.make(tmp_path_factory.mktemp("client") / "venv", *parts)


@pytest.fixture(scope="module")
def bench_environment(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    parts = [wheels[f"unroll_{name}"] for name in ("proto", "client", "bench")]
    return Environment.make(tmp_path_factory.mktemp("bench") / "venv", *parts)


@pytest.fixture(scope="module")
def web_environment(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    parts = [wheels[f"unroll_{name}"] for name in ("proto", "client", "web")]
    return Environment.make(tmp_path_factory.mktemp("web") / "venv", *parts)


@pytest.fixture(scope="module")
def server_environment(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    parts = [wheels[f"unroll_{name}"] for name in ("proto", "engine", "server")]
    return Environment.make(tmp_path_factory.mktemp("server") / "venv", *parts)


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    """Reads constraints.txt: version by name."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(name): version for name, version in pairs}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_wheel_holds_every_file_of_its_package(wheels: dict[str, Path], name: str) -> None:
    package = f"unroll_{name}"
    folder = REPOSITORY / name
    files = {
        file.relative_to(folder).as_posix()
        for file in (folder / package).rglob("*")
        # Sources in C++ are in the sdist alone. A wheel holds its own build of them, not what lies here.
        if file.is_file() and not {"__pycache__", "cpp"} & {*file.parts} and file.suffix != ".so"
    }
    with zipfile.ZipFile(wheels[package]) as wheel:
        held = {entry for entry in wheel.namelist() if ".dist-info/" not in entry}
    compiled = {entry for entry in held if entry.endswith(".so")}
    assert held - compiled == files
    assert len(compiled) == (shutil.which("c++") is not None and (name == "engine" or (name == "server" and NGHTTP2)))
    assert f"{package}/py.typed" in held


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_wheel_says_what_it_is_and_under_which_licence(wheels: dict[str, Path], name: str) -> None:
    licence = (REPOSITORY / "LICENSE").read_bytes()
    info = f"unroll_{name}-{importlib.metadata.version(f'unroll-{name}')}.dist-info"
    with zipfile.ZipFile(wheels[f"unroll_{name}"]) as wheel:
        metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
        assert wheel.read(f"{info}/licenses/LICENSE") == licence
    # An sdist takes the file from here; a link would dangle in it.
    assert not (REPOSITORY / name / "LICENSE").is_symlink()
    fields = {field: metadata.get_all(field) for field in metadata}
    assert fields["License-Expression"] == ["Apache-2.0"]
    assert fields["Author"] == ["The Unroll authors"]
    assert fields["Requires-Python"] == [">=3.11"]
    assert fields.keys() >= {"Summary", "Keywords", "Project-URL"}
    classifiers = fields["Classifier"] or []
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= set(classifiers)
    readme = str(metadata.get_payload())
    assert readme.startswith(f"# unroll-{name}\n")
    # PyPI shows no files of the repository.
    assert not re.search(r"\]\((?!https://)", readme)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_its_version_and_usage(command: str) -> None:
    version = importlib.metadata.version(COMMANDS[command])
    # The environment of a deployment may well have this name.
    assert run(command, "--version", env={"UNROLL_VERSION": "7"}).stdout == f"{command} {version}\n"
    usage = run(command, "-h").stdout
    assert usage == run(command, "--help").stdout
    assert usage.startswith(f"Usage: {command} ")
    assert "--version" in usage


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize(("name", "part"), [("engine", "step kernel"), ("server", "native transport")])
def test_without_a_compiler_a_wheel_comes_without_its_compiled_part_unless_that_is_required(
    tmp_path: Path, name: str, part: str, required: bool
) -> None:
    variable = {"engine": "UNROLL_KERNEL_REQUIRED", "server": "UNROLL_NATIVE_REQUIRED"}[name]
    environment = os.environ | {"CXX": "/bin/false"} | ({variable: "1"} if required else {})
    options = ["--verbose", "--no-deps", "--wheel-dir", str(tmp_path), str(REPOSITORY / name)]
    command = [sys.executable, "-m", "pip", "wheel", *options]
    built = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    wheels = [wheel.name for wheel in tmp_path.iterdir()]
    assert (built.returncode != 0) == required, built.stdout
    assert [wheel.endswith("-py3-none-any.whl") for wheel in wheels] == ([] if required else [True])
    assert (f"WARNING: unroll-{name} was built without its {part}" in built.stderr) != required


def test_the_contracts_come_with_their_sources_and_the_generated_code(wheels: dict[str, Path]) -> None:
    with zipfile.ZipFile(wheels["unroll_proto"]) as wheel:
        held = {entry.removeprefix("unroll_proto/v1/") for entry in wheel.namelist()}
    for contract in ("bundle", "unroll"):
        assert {f"{contract}.proto", f"{contract}_pb2.py", f"{contract}_pb2.pyi"} <= held
    assert {"unroll_pb2_grpc.py", "unroll_pb2_grpc.pyi"} <= held


def test_the_client_is_small_and_needs_no_extra(
    client_environment: Environment, pins: dict[str, str], tmp_path: Path
) -> None:
    installed = client_environment.installed()
    assert installed.keys() & OURS == {"unroll-proto", "unroll-client"}
    assert not installed.keys() & {"torch", "onnx", "onnxruntime", "pyarrow", "rich", "hpack"}
    assert {name: version for name, version in installed.items() if name not in OURS} == {
        name: pins.get(name) for name in installed.keys() - OURS
    }
    assert client_environment.megabytes() <= 120
    assert client_environment.import_failures("unroll_client") == {
        "unroll_client.cli.local": "unroll_engine",
        "unroll_client.cli.parquet": "pyarrow",
    }
    assert client_environment.import_failures("unroll_proto") == {
        f"unroll_proto.sequences.{name}": "pyarrow"
        for name in ("arrow", "cells", "columns", "sequence_rows", "tables", "timestep_rows")
    }
    unroll = client_environment.bin / "unroll"
    assert "classify" in output_of(unroll, "--help")
    assert "confusion matrix" in output_of(unroll, "classify", "--help")
    missing = finished(unroll, "web")
    assert (missing.returncode, missing.stderr) == (2, "unroll: web: not installed: pip install unroll-web\n")
    source = tmp_path / "x.parquet"
    write_sequences(source, [Sequence("a", np.zeros((2, 3), np.float32), row=1)])
    for words in ((source,), ("x.npz", "-o", tmp_path / "y.parquet")):
        done = finished(unroll, "classify", *words)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert done.stderr.endswith("Parquet needs pyarrow: pip install 'unroll-client[files]'\n")


def test_the_client_works_by_itself(
    client_environment: Environment, server: ServerProcess, vowels: list[Sequence], tmp_path: Path
) -> None:
    source, target = tmp_path / "sequences.npz", tmp_path / "classes.jsonl"
    arrays = [sequence.values for sequence in vowels]
    np.savez(source, values=np.concatenate(arrays), lengths=[len(array) for array in arrays])
    unroll = client_environment.bin / "unroll"
    output_of(unroll, "classify", source, "--model", "jv", "--server", server.address, "-o", target)
    with Client(server.address) as client:
        expected = client.classify(arrays, model="jv")
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["label"] for row in rows] == expected.labels
    assert np.array([row["logits"] for row in rows], np.float32).tobytes() == expected.logits.tobytes()


def test_the_load_generator_needs_the_client_only(
    bench_environment: Environment, server: ServerProcess, tmp_path: Path
) -> None:
    assert bench_environment.installed().keys() & OURS == {"unroll-proto", "unroll-client", "unroll-bench"}
    failed = bench_environment.import_failures("unroll_bench")
    assert all(module.startswith(("unroll_bench.contest.", "unroll_bench.offline")) for module in failed), failed
    words = ("--server", server.address, "--closed", "2", "--seconds", "0.3", "--json")
    assert json.loads(output_of(bench_environment.bin / "unroll-bench", *words))["calls"] > 0


def test_the_web_adds_its_command_to_the_client_s(
    web_environment: Environment, pins: dict[str, str], server: ServerProcess, tmp_path: Path
) -> None:
    installed = web_environment.installed()
    assert installed.keys() & OURS == {"unroll-proto", "unroll-client", "unroll-web"}
    assert {name: version for name, version in installed.items() if name not in OURS} == {
        name: pins.get(name) for name in installed.keys() - OURS
    }
    assert web_environment.megabytes() <= 130
    assert not web_environment.import_failures("unroll_web")
    assert "  web " in output_of(web_environment.bin / "unroll", "--help")
    with WebProcess(server.address, tmp_path / "log", executables=web_environment.bin) as web:
        assert ask(web.address, "/v2/health/ready").status == ask(web.address, "/").status == 200
        assert web.stop() == 0, web.log


def test_the_server_is_small_and_needs_no_torch(server_environment: Environment, pins: dict[str, str]) -> None:
    installed = server_environment.installed()
    assert installed.keys() & OURS == {"unroll-proto", "unroll-engine", "unroll-server"}
    assert not installed.keys() & {"torch", "onnx"}
    assert {name: version for name, version in installed.items() if name not in OURS} == {
        name: pins.get(name) for name in installed.keys() - OURS
    }
    assert server_environment.megabytes() <= 200
    assert server_environment.import_failures("unroll_server") == {
        "unroll_server.sessions.redis_client": "redis",
        "unroll_server.sessions.redis_store": "redis",
    }
    assert server_environment.import_failures("unroll_engine") == {
        "unroll_engine.runtimes.cudnn": "torch",
        "unroll_engine.runtimes.lane_tensors": "torch",
        "unroll_engine.runtimes.torchscript": "torch",
        "unroll_engine.runtimes.torchscript_cuda": "torch",
    }
    assert "--models" in output_of(server_environment.bin / "unroll-serve", "--help")


def test_the_engine_works_in_process_without_grpc(
    server_environment: Environment, server: ServerProcess, bundle_root: Path, vowels: list[Sequence], tmp_path: Path
) -> None:
    arrays = [sequence.values for sequence in vowels]
    np.savez(tmp_path / "sequences.npz", *arrays)
    program = """
import sys
import numpy as np
from unroll_engine import Engine
arrays = np.load(sys.argv[2])
logits = Engine.load(sys.argv[1]).classify([arrays[name] for name in arrays.files]).logits
assert not {"grpc", "prometheus_client", "click", "torch"} & sys.modules.keys()
print(logits.tobytes().hex())
"""
    mine = output_of(server_environment.bin / "python", "-c", program, bundle_root / "jv", tmp_path / "sequences.npz")
    with Client(server.address) as client:
        assert mine.strip() == client.classify(arrays, model="jv").logits.tobytes().hex()


def test_the_server_works_by_itself(
    server_environment: Environment,
    server: ServerProcess,
    bundle_root: Path,
    vowels: list[Sequence],
    tmp_path: Path,
) -> None:
    arrays = [sequence.values for sequence in vowels]
    check = (server_environment.bin / "python", "-m", "unroll_server.healthcheck")
    with ServerProcess(bundle_root, tmp_path / "log", executables=server_environment.bin) as alone:
        with Client(alone.address) as client, Client(server.address) as other:
            mine, expected = client.classify(arrays, model="jv"), other.classify(arrays, model="jv")
        assert mine.logits.tobytes() == expected.logits.tobytes()
        assert output_of(*check, alone.address) == f"{alone.address}: SERVING\n"
        assert output_of(*check, alone.address, "--service", "unroll.v1.UnrollService").endswith(": SERVING\n")
        unknown = finished(*check, alone.address, "--service", "none.such")
        assert (unknown.returncode, unknown.stdout) == (1, "")
        assert unknown.stderr.startswith(f"healthcheck: {alone.address}: NOT_FOUND")
        assert alone.stop() == 0, alone.log
        gone = finished(*check, alone.address)
        assert (gone.returncode, len(gone.stderr.splitlines())) == (1, 1)
        assert gone.stderr.startswith(f"healthcheck: {alone.address}: UNAVAILABLE")


@pytest.mark.parametrize(
    ("option", "value", "missing"),
    [("--runtime", "torchscript", "torch")],
)
def test_what_an_environment_lacks_is_said_in_one_line(
    server_environment: Environment, bundle_root: Path, option: str, value: str, missing: str
) -> None:
    done = finished(server_environment.bin / "unroll-serve", "--models", bundle_root, option, value)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert missing in done.stderr
