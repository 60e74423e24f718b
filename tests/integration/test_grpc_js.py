"""grpc-js, the client of Node.js, on both transports: the bits of our own client, and statuses as gRPC writes them."""

import base64
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google.rpc
import grpc
import pytest
from google.rpc import status_pb2
from support import wire
from support.processes import PATIENCE, ServerProcess
from support.transports import BOTH

from unroll_proto.sequences import Sequence
from unroll_proto.v1 import unroll_pb2 as pb

pytestmark = BOTH

ROOT = Path(__file__).parents[2]
COUNT = 12
"""Sequences that the client sends."""
OUTPUTS = 9

Answers = Mapping[str, Any]


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """A folder with grpc-js, as a stranger installs it."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here")
    done = subprocess.run(
        ["make", ".node/done"], cwd=ROOT, capture_output=True, text=True, timeout=5 * PATIENCE, check=False
    )
    if done.returncode:
        pytest.skip(f"grpc-js can't be installed: {done.stderr.splitlines()[-1]}")
    return ROOT / ".node"


@pytest.fixture(scope="session")
def answers(server: ServerProcess, node_modules: Path, vowels: list[Sequence]) -> Answers:
    given = [
        {"steps": len(each.values), "values": base64.b64encode(wire.to_bytes(each.values)).decode()}
        for each in vowels[:COUNT]
    ]
    script, googleapis = ROOT / "tests/support/grpc_js_calls.cjs", Path(google.rpc.__path__[0]).parents[1]
    done = subprocess.run(
        ["node", script, node_modules, server.address, ROOT / "proto", googleapis],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + server.log
    found: Answers = json.loads(done.stdout)
    return found


@pytest.fixture(scope="session")
def classified(server: ServerProcess, vowels: list[Sequence]) -> pb.ClassifyResponse:
    """The same sequences by grpcio's client."""
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(
            "/unroll.v1.UnrollService/Classify", pb.ClassifyRequest.SerializeToString, pb.ClassifyResponse.FromString
        )
        request = wire.classify_request([each.values for each in vowels[:COUNT]], return_final_states=True)
        response: pb.ClassifyResponse = call(request, timeout=PATIENCE)
        return response


def rows(raw: str) -> wire.Array:
    return wire.to_array(base64.b64decode(raw), OUTPUTS)


@pytest.mark.parametrize("encoding", ["identity", "gzip", "deflate"])
def test_a_batch_has_the_same_bits_however_it_is_compressed(
    answers: Answers, classified: pb.ClassifyResponse, encoding: str
) -> None:
    answer = answers[encoding]
    assert base64.b64decode(answer["logits"]) == classified.logits
    assert [base64.b64decode(state) for state in answer["states"]] == [
        each.state[0] for each in classified.final_states
    ]


def test_calls_at_once_have_the_bits_of_the_batch(answers: Answers, classified: pb.ClassifyResponse) -> None:
    expected = wire.to_array(classified.logits, OUTPUTS)
    assert len(answers["atOnce"]) == 300
    for index, answer in enumerate(answers["atOnce"]):
        assert rows(answer).tobytes() == expected[index % COUNT].tobytes()


def test_a_stream_has_the_bits_of_the_batch(
    answers: Answers, classified: pb.ClassifyResponse, vowels: list[Sequence]
) -> None:
    """The client sends two steps of each sequence alone, and the rest of all sequences in one message."""
    expected = wire.to_array(classified.logits, OUTPUTS)
    assert answers["streamed"]["code"] == 0
    sequences = answers["streamed"]["sequences"]
    for vowel, sequence, last in zip(vowels, sequences, expected, strict=False):
        logits = rows(sequence["logits"])
        assert len(logits) == sequence["closed"] == len(vowel.values)
        assert logits[-1].tobytes() == last.tobytes()
    assert any(sequence["batched"] for sequence in sequences)


@pytest.mark.parametrize(
    ("case", "code", "field"),
    [
        ("unknown", grpc.StatusCode.NOT_FOUND, "model"),
        ("wrong", grpc.StatusCode.INVALID_ARGUMENT, "values"),
        ("large", grpc.StatusCode.RESOURCE_EXHAUSTED, None),
        ("missing", grpc.StatusCode.UNIMPLEMENTED, None),
        ("malformed", grpc.StatusCode.INVALID_ARGUMENT, None),
        ("late", grpc.StatusCode.DEADLINE_EXCEEDED, None),
        ("cancelled", grpc.StatusCode.CANCELLED, None),
    ],
)
def test_a_refusal_has_its_status(answers: Answers, case: str, code: grpc.StatusCode, field: str | None) -> None:
    refused = answers[case]
    assert refused["code"] == code.value[0]
    if field:
        (status,) = map(base64.b64decode, refused["status"])
        assert [name for name, _ in wire.violations_of(status_pb2.Status.FromString(status))] == [field]


def test_health_is_answered(answers: Answers) -> None:
    """A message whose only field, the status, is SERVING."""
    assert base64.b64decode(answers["health"]) == b"\x08\x01"
