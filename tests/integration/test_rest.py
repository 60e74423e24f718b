"""The REST API of a real web process before a real server: the same bits as gRPC, streams, errors."""

import base64
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from support.processes import ServerProcess, WebProcess
from support.web import Answer, ask, connect, event_of

from unroll_client import Client, Snapshot
from unroll_proto.sequences import Sequence

Array = NDArray[np.float32]
FORMS = ("numbers", "hex", "base64")
CLASSIFY, UNROLL, INFER = "/v1/models/jv:classify", "/v1/models/jv:unroll", "/v2/models/jv/infer"
HEADER = "inference-header-content-length"


def written(values: Array, form: str) -> Any:
    """Writes an array in a form of the API, by this test's own reading of the documentation."""
    if form == "numbers":
        return [[float(number) for number in row] for row in values]
    data = values.astype("<f4").tobytes()
    return {"shape": list(values.shape), form: data.hex() if form == "hex" else base64.b64encode(data).decode()}


def read(value: Any) -> Array:
    """Reads an array in any form; numbers as float32 and as float64 must be the same."""
    if isinstance(value, list):
        assert (np.array(value, np.float32).astype(np.float64) == np.array(value, np.float64)).all()
        return np.array(value, np.float32)
    data = bytes.fromhex(value["hex"]) if "hex" in value else base64.b64decode(value["base64"])
    return np.frombuffer(data, "<f4").reshape(value["shape"])


def infer_body(values: Array, binary: bool, **more: Any) -> tuple[bytes, dict[str, str]]:
    """Makes the body and the headers of an infer request for values [batch, time, features]."""
    tensor: dict[str, Any] = {"name": "input", "datatype": "FP32", "shape": list(values.shape)}
    data = values.astype("<f4").tobytes()
    if binary:
        tensor["parameters"] = {"binary_data_size": len(data)}
    else:
        tensor["data"] = values.astype(np.float64).tolist()
    header = json.dumps({"inputs": [tensor], **more}).encode()
    return (header + data, {HEADER: str(len(header))}) if binary else (header, {})


def inferred(answer: Answer) -> dict[str, Array]:
    """Returns the float32 outputs of an answer by name."""
    assert answer.status == 200, answer.data
    size = int(answer.headers.get(HEADER, len(answer.data)))
    outputs, place, content = {}, size, json.loads(answer.data[:size])
    for output in content["outputs"]:
        if (length := output.get("parameters", {}).get("binary_data_size")) is not None:
            values = np.frombuffer(answer.data[place : place + length], "<f4")
            place += length
        else:
            values = read(output["data"])
        outputs[output["name"]] = values.reshape(output["shape"])
    assert place == len(answer.data)
    return outputs


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address, model="jv") as client:
        yield client


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_form_gives_the_bits_of_grpc(web: WebProcess, client: Client, data: st.DataObject) -> None:
    numbers = st.floats(-1e3, 1e3, width=32)
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    sequences = [data.draw(arrays(np.float32, (length, 12), elements=numbers)) for length in lengths]
    forms = data.draw(st.lists(st.sampled_from(FORMS), min_size=len(lengths), max_size=len(lengths)))
    floats = data.draw(st.sampled_from(FORMS))
    expected = client.classify(sequences, return_final_states=True)
    content = {
        "sequences": [written(*pair) for pair in zip(sequences, forms, strict=True)],
        "floats": floats,
        "return_snapshots": True,
    }
    answer = ask(web.address, CLASSIFY, content)
    assert answer.status == 200, answer.data
    assert (answer.json["model"], answer.json["version"]) == ("jv", 1)
    results = answer.json["results"]
    assert [row["label"] for row in results] == expected.labels
    assert [row["label_index"] for row in results] == expected.label_indices.tolist()
    for name, rows in (("logits", expected.logits), ("probabilities", expected.probabilities)):
        assert np.stack([read(row[name]) for row in results]).tobytes() == rows.tobytes()
    states = [Snapshot.from_bytes(base64.b64decode(row["snapshot"])) for row in results]
    assert tuple(states) == expected.final_states
    first = sequences[0][np.newaxis]
    for binary in (False, True):
        body, headers = infer_body(first, binary, parameters={"binary_data_output": data.draw(st.booleans())})
        outputs = inferred(ask(web.address, INFER, body, headers=headers))
        assert list(outputs) == ["logits", "probabilities"]
        assert outputs["logits"].tobytes() == expected.logits[:1].tobytes()
        assert outputs["probabilities"].tobytes() == expected.probabilities[:1].tobytes()


def test_a_sequence_resumes_from_a_snapshot_anywhere(web: WebProcess, client: Client, vowels: list[Sequence]) -> None:
    values = vowels[0].values
    whole = ask(web.address, CLASSIFY, {"sequences": [written(values, "hex")], "floats": "hex"}).json["results"][0]
    head = {"sequences": [written(values[:5], "numbers")], "return_snapshots": True}
    snapshot = ask(web.address, CLASSIFY, head).json["results"][0]["snapshot"]
    tail = {"sequences": [written(values[5:], "base64")] * 2, "snapshots": [snapshot, None], "floats": "hex"}
    resumed, other = ask(web.address, CLASSIFY, tail).json["results"]
    assert resumed == whole
    assert other != whole
    with client.unroll(snapshot=Snapshot.from_bytes(base64.b64decode(snapshot)), logits=True) as sequence:
        logits = sequence.send(values[5:]).logits
    assert logits is not None
    assert logits[-1].tobytes() == read(whole["logits"]).tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_a_stream_reports_each_step_and_ends_with_a_snapshot(
    web: WebProcess, client: Client, vowels: list[Sequence], form: str
) -> None:
    values = vowels[1].values
    with client.unroll(logits=True) as sequence:
        steps = sequence.send(values)
        last = sequence.snapshot()
    assert steps.states is not None
    assert steps.logits is not None
    prefixes = client.classify([values[: step + 1] for step in range(len(values))])
    answer = ask(web.address, UNROLL, {"sequence": written(values, form), "floats": form})
    assert answer.headers.get_content_type() == "text/event-stream"
    events = answer.events
    assert events[0] == ("open", {"model": "jv", "version": 1, "step": 0})
    name, end = events[-1]
    assert (name, end["reason"], end["step"]) == ("end", "complete", len(values))
    assert Snapshot.from_bytes(base64.b64decode(end["snapshot"])) == last
    assert [name for name, _ in events[1:-1]] == ["step"] * len(values)
    contents = [content for _, content in events[1:-1]]
    assert [content["step"] for content in contents] == list(range(len(values)))
    assert np.stack([read(content["state"]) for content in contents]).tobytes() == steps.states.tobytes()
    assert np.stack([read(content["logits"]) for content in contents]).tobytes() == steps.logits.tobytes()
    probabilities = np.stack([read(content["probabilities"]) for content in contents])
    assert probabilities.tobytes() == prefixes.probabilities.tobytes()
    assert [content["label"] for content in contents] == prefixes.labels
    # The id of an event is its step.
    assert answer.data.decode().split("\n\n")[1].startswith("id: 0\nevent: step\n")


def test_a_stream_reports_what_is_asked_for(web: WebProcess, vowels: list[Sequence]) -> None:
    values = vowels[2].values
    content = {"sequence": written(values, "hex"), "return": ["logits"], "every": 4, "floats": "hex"}
    events = ask(web.address, UNROLL, content).events
    contents = [content for name, content in events if name == "step"]
    assert [content["step"] for content in contents] == list(range(3, len(values), 4))
    assert all(content.keys() == {"step", "logits"} for content in contents)


def test_a_long_stream_resumes_on_another_web_process_after_a_drain(
    server: ServerProcess, client: Client, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).standard_normal((50_000, 12)).astype(np.float32)
    content: dict[str, Any] = {"sequence": written(values, "base64"), "floats": "base64"}
    expected = client.classify([values]).logits[0]
    logits: list[Array] = []

    def take(text: str) -> dict[str, Any]:
        name, found = event_of(text)
        if name == "step":
            logits.append(read(found["logits"]))
        return dict(found)

    with WebProcess(server.address, tmp_path / "log") as draining:
        connection = connect(draining.address)
        # With the states it is far more than the buffers of a socket hold, so that it can't end before the signal.
        connection.request("POST", UNROLL, json.dumps(content), {"content-type": "application/json"})
        response = connection.getresponse()
        parts = [response.readline() for _ in range(3000)]
        assert response.headers["content-type"].startswith("text/event-stream")
        draining.process.terminate()
        text = b"".join([*parts, response.read()]).decode()
        connection.close()
        *_, end = [take(part) for part in text.split("\n\n") if part]
        assert draining.wait() == 0, draining.log
    assert end["reason"] == "draining"
    assert 0 < end["step"] < len(values)
    assert len(logits) == end["step"]
    content |= {"sequence": written(values[end["step"] :], "base64"), "snapshot": end["snapshot"], "return": ["logits"]}
    with WebProcess(server.address, tmp_path / "log2") as other:
        rest = ask(other.address, UNROLL, content)
    assert rest.events[0][1]["step"] == end["step"]
    assert rest.events[-1][1]["step"] == len(values)
    for part in rest.data.decode().split("\n\n")[1:-2]:
        take(part)
    assert len(logits) == len(values)
    assert logits[-1].tobytes() == expected.tobytes()


def test_a_sequence_of_the_open_inference_protocol_goes_on_by_its_id(
    web: WebProcess, client: Client, vowels: list[Sequence]
) -> None:
    values = vowels[3].values
    expected = client.classify([values]).logits
    for start, end in ((0, 4), (4, len(values))):
        parameters = {"sequence_id": "rest", "sequence_start": start == 0, "sequence_end": end == len(values)}
        outputs = [{"name": "logits", "parameters": {"binary_data": True}}, {"name": "states"}]
        body, headers = infer_body(
            values[np.newaxis, start:end], start == 0, id="7", parameters=parameters, outputs=outputs
        )
        answer = ask(web.address, "/v2/models/jv/versions/1/infer", body, headers=headers)
        results = inferred(answer)
        assert results["states"].shape == (1, end - start, 128)
    assert results["logits"].tobytes() == expected.tobytes()
    assert json.loads(answer.data[: int(answer.headers[HEADER])])["id"] == "7"


def test_classes_are_texts(web: WebProcess, client: Client, vowels: list[Sequence]) -> None:
    outputs = [{"name": "probabilities", "parameters": {"classification": 2}}]
    body, _ = infer_body(vowels[0].values[np.newaxis], False, outputs=outputs)
    (output,) = ask(web.address, INFER, body).json["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [1, 2])
    assert output["data"][0].rpartition(":")[2] == client.classify([vowels[0].values]).labels[0]


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_request_has_the_same_answer(web: WebProcess, vowels: list[Sequence], encoding: str) -> None:
    body, headers = infer_body(vowels[0].values[np.newaxis], True)
    plain = ask(web.address, INFER, body, headers=headers)
    data = gzip.compress(body) if encoding == "gzip" else zlib.compress(body)
    packed = ask(web.address, INFER, data, headers={**headers, "content-encoding": encoding})
    assert packed.data == plain.data


def test_models_are_listed_and_described(web: WebProcess) -> None:
    (model,) = ask(web.address, "/v1/models").json["models"]
    assert ask(web.address, "/v1/models/jv").json == ask(web.address, "/v1/models/jv?version=1").json == model
    assert (model["name"], model["version"], model["input_size"], model["architecture"]) == ("jv", 1, 12, "simple_rnn")
    assert model["states"] == [{"name": "state", "dtype": "float32", "shape": [1, 128]}]
    index = ask(web.address, "/v2/repository/index", {"ready": True}).json
    assert index == ask(web.address, "/v2/repository/index", method="POST").json
    assert [(each["name"], each["version"], each["state"]) for each in index] == [("jv", "1", "READY")]


STEP = [[0.0] * 12]


@pytest.mark.parametrize(
    ("path", "content", "status", "code", "part"),
    [
        ("/v1/models/no:classify", {"sequences": [STEP]}, 404, "NOT_FOUND", "'no' is not served"),
        (CLASSIFY, {"sequences": [STEP], "version": 9}, 404, "NOT_FOUND", "jv/9"),
        (CLASSIFY, {"sequences": [STEP], "version": -1}, 400, "INVALID_ARGUMENT", "version: -1"),
        (CLASSIFY, {"sequences": [STEP], "version": True}, 400, "INVALID_ARGUMENT", "version: an integer expected"),
        (CLASSIFY, {}, 400, "INVALID_ARGUMENT", "sequences: required"),
        (CLASSIFY, {"sequences": [STEP], "sequence": 1}, 400, "INVALID_ARGUMENT", "sequence: unknown; the members"),
        (CLASSIFY, {"sequences": [[[1.0, 2.0]]]}, 400, "INVALID_ARGUMENT", "sequences[0]: 2 features, model jv has 12"),
        (CLASSIFY, {"sequences": [STEP, [[1.0], [1.0, 2.0]]]}, 400, "INVALID_ARGUMENT", "sequences[1]: "),
        (CLASSIFY, {"sequences": [STEP, [["a"] * 12]]}, 400, "INVALID_ARGUMENT", "sequences[1]: numbers expected"),
        (CLASSIFY, {"sequences": [[[1e39] * 12]]}, 400, "INVALID_ARGUMENT", "not finite"),
        (CLASSIFY, {"sequences": [{"shape": [1, 12], "hex": "zz"}]}, 400, "INVALID_ARGUMENT", "sequences[0].hex"),
        (CLASSIFY, {"sequences": [{"shape": [1, 12], "hex": "00"}]}, 400, "INVALID_ARGUMENT", "1 bytes, 48 expected"),
        (CLASSIFY, {"sequences": [{"shape": [1], "hex": "00"}]}, 400, "INVALID_ARGUMENT", "[steps, features]"),
        (CLASSIFY, {"sequences": [STEP], "snapshots": ["AAAA"]}, 400, "INVALID_ARGUMENT", "snapshots[0]: "),
        (CLASSIFY, {"sequences": [STEP], "snapshots": [7]}, 400, "INVALID_ARGUMENT", "snapshots[0]: "),
        (CLASSIFY, {"sequences": [STEP], "floats": "octal"}, 400, "INVALID_ARGUMENT", "floats: numbers or hex"),
        (CLASSIFY, b"[1, 2]", 400, "INVALID_ARGUMENT", "a JSON object expected, got a list"),
        (CLASSIFY, b'{"sequences": [[[NaN]]]}', 400, "INVALID_ARGUMENT", "NaN is not a number of JSON"),
        (CLASSIFY, b"[" * 100_000, 400, "INVALID_ARGUMENT", "body: not JSON: nested too deep"),
        (CLASSIFY, b'{"floats": "\\ud800", "sequences": []}', 400, "INVALID_ARGUMENT", "lone surrogate"),
        (UNROLL, {"sequence": [[1.0]]}, 400, "INVALID_ARGUMENT", "1 features, the model has 12"),
        (UNROLL, {"sequence": []}, 400, "INVALID_ARGUMENT", "[steps, features]"),
        (UNROLL, {"sequence": STEP, "every": 0}, 400, "INVALID_ARGUMENT", "every: 0"),
        (UNROLL, {"sequence": STEP, "return": ["gates"]}, 400, "INVALID_ARGUMENT", "return: states, logits"),
        ("/v1/models/no:unroll", {"sequence": STEP}, 404, "NOT_FOUND", "'no' is not served"),
        (INFER, {"inputs": []}, 400, "INVALID_ARGUMENT", "`input` is missing"),
        (INFER, {"inputs": [7]}, 400, "INVALID_ARGUMENT", "inputs[0]: an object expected"),
        (
            INFER,
            {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 1, 12]}]},
            400,
            "INVALID_ARGUMENT",
            "data",
        ),
        ("/v2/models/jv/versions/x/infer", {"inputs": []}, 400, "INVALID_ARGUMENT", "'x' is not a version"),
        ("/v2/repository/models/jv/load", {}, 404, "NOT_FOUND", "not found"),
    ],
)
def test_a_wrong_request_says_what_is_wrong(
    web: WebProcess, path: str, content: Any, status: int, code: str, part: str
) -> None:
    answer = ask(web.address, path, content)
    problem = answer.json
    assert (answer.status, problem["status"], problem["code"]) == (status, status, code)
    assert answer.headers.get_content_type() == "application/problem+json"
    assert part in problem["detail"]
    assert problem["request_id"] == answer.headers["x-request-id"]


def test_a_lost_server_is_said_while_the_process_lives(bundle_root: Path, tmp_path: Path) -> None:
    with (
        ServerProcess(bundle_root, tmp_path / "server") as server,
        WebProcess(server.address, tmp_path / "web") as web,
    ):
        assert ask(web.address, "/v2/health/ready").status == 200
        assert server.stop() == 0
        for path in ("/v2/health/ready", "/v2/health/live", "/v1/models"):
            answer = ask(web.address, path)
            assert (answer.status, answer.json["code"]) == (503, "UNAVAILABLE")
        assert ask(web.address, "/healthz").status == 200
        assert web.stop() == 0, web.log
