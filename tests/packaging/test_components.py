"""Third-party components: NOTICE and SBOMs list them; images have the version of the distributions."""

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.packaging

REPOSITORY = Path(__file__).parents[2]
DOCKERFILES = sorted(
    file.relative_to(REPOSITORY) for folder in ("*", "*/*") for file in REPOSITORY.glob(f"{folder}/Dockerfile")
)


def components(*arguments: str) -> str:
    script = REPOSITORY / "packaging" / "components.py"
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True).stdout


def test_notice_names_what_the_distributions_require() -> None:
    notice = (REPOSITORY / "NOTICE").read_text()
    assert components("notice", sys.prefix) == notice, "run `make notice`"
    licences = dict(re.findall(r"^- (\S+): (\S.*)$", notice, re.MULTILINE))
    assert licences.keys() >= {"torch", "onnxruntime", "pyarrow", "redis", "opentelemetry-sdk", "aeon"}
    assert not licences.keys() & {"pytest", "mypy", "unroll-proto"}


def test_an_sbom_holds_every_distribution_once_and_what_it_requires() -> None:
    text = components("sbom", "unroll-test", "1.2.3", sys.prefix)
    assert components("sbom", "unroll-test", "1.2.3", sys.prefix) == text
    document: dict[str, Any] = json.loads(text)
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert document["metadata"]["component"]["version"] == "1.2.3"
    refs = [component["bom-ref"] for component in document["components"]]
    assert len(refs) == len(set(refs))
    needs = {entry["ref"]: entry["dependsOn"] for entry in document["dependencies"]}
    assert set().union(*needs.values()) <= set(refs)
    assert needs.keys() == {*refs, document["metadata"]["component"]["bom-ref"]}
    server, grpcio = (f"pkg:pypi/{name}@{version(name)}" for name in ("unroll-server", "grpcio"))
    assert f"pkg:pypi/unroll-proto@{version('unroll-proto')}" in needs[server]
    (found,) = (component for component in document["components"] if component["purl"] == grpcio)
    assert found["licenses"] == [{"expression": "Apache-2.0"}]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=str)
def test_an_image_has_the_version_of_the_distributions(dockerfile: Path) -> None:
    versions = {tomllib.loads(file.read_text())["project"]["version"] for file in REPOSITORY.glob("*/pyproject.toml")}
    assert {line for line in (REPOSITORY / dockerfile).read_text().splitlines() if line.startswith("ARG VERSION")} == {
        f"ARG VERSION={single}" for single in versions
    }
