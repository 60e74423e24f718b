"""NVIDIA's tritonclient over HTTP, unmodified and in its own environment, against a real web process."""

import json
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from support.processes import PATIENCE, ServerProcess, WebProcess

from unroll_client import Classification, Client
from unroll_proto.sequences import Sequence

CALLS = Path(__file__).parents[1] / "support/triton_http_calls.py"
COUNT = 6
"""Sequences that the client sends."""


@pytest.fixture(scope="module")
def answers(
    web: WebProcess, triton_python: Path, vowels: list[Sequence], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Returns arrays by call, and `facts`."""
    folder = tmp_path_factory.mktemp("triton")
    given: dict[str, Any] = {f"s{index}": each.values for index, each in enumerate(vowels[:COUNT])}
    np.savez(folder / "given.npz", **given)
    command: list[str | Path] = [
        triton_python,
        CALLS,
        urlsplit(web.address).netloc,
        folder / "given.npz",
        folder / "answers.npz",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr + web.log
    with np.load(folder / "answers.npz") as content:
        return {name: content[name] for name in content.files} | {"facts": json.loads(str(content["facts"]))}


@pytest.fixture(scope="module")
def classified(server: ServerProcess, vowels: list[Sequence]) -> Classification:
    with Client(server.address, model="jv") as client:
        return client.classify([each.values for each in vowels[:COUNT]])


@pytest.mark.parametrize("way", ["binary", "json", "gzip", "deflate", "default", "async", "asyncio", "sequences"])
def test_every_way_to_ask_has_classify_s_bits(answers: dict[str, Any], classified: Classification, way: str) -> None:
    assert answers[way].tobytes() == classified.logits.tobytes()


def test_classes_are_named(answers: dict[str, Any], classified: Classification) -> None:
    assert [text.rpartition(":")[2] for text in answers["classes"]] == classified.labels


def test_server_and_model_are_described(answers: dict[str, Any]) -> None:
    facts = answers["facts"]["described"]
    names = ("live", "ready", "model_ready", "version_ready", "other_ready")
    assert [facts[name] for name in names] == [True] * 4 + [False]
    assert facts["server"]["name"] == "unroll"
    assert {"sequence", "binary_tensor_data"} <= set(facts["server"]["extensions"])
    assert (facts["model"]["name"], facts["model"]["versions"]) == ("jv", ["1"])
    shapes = {each["name"]: (each["datatype"], each["shape"]) for each in facts["model"]["inputs"]}
    assert shapes["input"] == ("FP32", [-1, -1, 12])
    assert [each["dims"] for each in facts["config"]["input"]] == [[-1, -1, 12], [-1], [-1, 1, 128]]
    assert [(each["name"], each["version"], each["state"]) for each in facts["index"]] == [("jv", "1", "READY")]
    assert [one["model_stats"][0]["name"] for one in facts["statistics"]] == ["jv", "jv"]


@pytest.mark.parametrize(
    ("case", "status", "part"),
    [
        ("model", "404", "'nothing' is not served"),
        ("version", "404", "/7 is not served"),
        ("features", "400", "has 5 features, jv/1 takes 12"),
        ("output", "400", "no output 'nothing'"),
        ("metadata", "404", "'nothing' is not served"),
        ("load", "404", "not found"),
        ("shared memory", "404", "not found"),
    ],
)
def test_a_refusal_is_the_client_s_exception(answers: dict[str, Any], case: str, status: str, part: str) -> None:
    found, message = answers["facts"]["errors"][case]
    assert found == status
    assert part in message
