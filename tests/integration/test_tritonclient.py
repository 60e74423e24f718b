"""NVIDIA's tritonclient, unmodified and in its own environment, against a real server."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from support import wire
from support.eager import TOLERANCE, eager
from support.processes import PATIENCE, ServerProcess
from support.transports import BOTH

from unroll_engine.kernel import unavailable_reason
from unroll_export.runs import TrainedRun
from unroll_proto.inference import model_config_pb2, service_pb2
from unroll_proto.sequences import Sequence
from unroll_proto.v1 import unroll_pb2 as pb

pytestmark = BOTH

ROOT = Path(__file__).parents[2]
COUNT = 12
"""Sequences that the client sends."""


class Answers:
    """Results of the client.

    Attributes:
        facts: Results of each call that are not arrays.
    """

    def __init__(self, file: Path) -> None:
        with np.load(file) as content:
            self.facts: Mapping[str, Any] = json.loads(str(content["facts"]))
            self._arrays: dict[str, wire.Array] = {name: content[name] for name in content.files if name != "facts"}

    def array(self, call: str, name: str) -> wire.Array:
        return self._arrays[f"{call}/{name}"]


@pytest.fixture(scope="session")
def answers(
    server: ServerProcess, triton_python: Path, vowels: list[Sequence], tmp_path_factory: pytest.TempPathFactory
) -> Answers:
    folder = tmp_path_factory.mktemp("triton")
    given: dict[str, Any] = {f"s{index}": each.values for index, each in enumerate(vowels[:COUNT])}
    np.savez(folder / "given.npz", **given)
    done = subprocess.run(
        [
            triton_python,
            ROOT / "tests/support/triton_calls.py",
            server.address,
            folder / "given.npz",
            folder / "answers.npz",
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + server.log
    return Answers(folder / "answers.npz")


@pytest.fixture(scope="session")
def classified(server: ServerProcess, vowels: list[Sequence]) -> tuple[wire.Array, wire.Array, wire.Array]:
    """Returns the results of Classify: logits, probabilities, final states [sequences, hidden]."""
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(
            "/unroll.v1.UnrollService/Classify", pb.ClassifyRequest.SerializeToString, pb.ClassifyResponse.FromString
        )
        request = wire.classify_request([each.values for each in vowels[:COUNT]], return_final_states=True)
        response = call(request, timeout=PATIENCE)
    states = np.concatenate([wire.to_array(each.state[0], 128) for each in response.final_states])
    return wire.to_array(response.logits, 9), wire.to_array(response.probabilities, 9), states


Classified = tuple[wire.Array, wire.Array, wire.Array]


def test_our_messages_are_a_part_of_the_client_s_under_the_same_numbers(answers: Answers) -> None:
    theirs = answers.facts["contract"]
    messages = [*service_pb2.DESCRIPTOR.message_types_by_name.values()]
    messages += model_config_pb2.DESCRIPTOR.message_types_by_name.values()
    assert len(messages) > 30
    while messages:
        message = messages.pop()
        messages += message.nested_types
        ours = {field.name: [field.number, field.type, field.is_repeated] for field in message.fields}
        assert ours.items() <= theirs[message.full_name].items(), message.full_name


def test_server_and_model_are_described(answers: Answers, trained_run: TrainedRun) -> None:
    facts = answers.facts["described"]
    assert [facts[name] for name in ("live", "ready", "model_ready", "version_ready", "other_ready")] == [True] * 4 + [
        False
    ]
    assert facts["server"]["name"] == "unroll"
    assert facts["server"]["extensions"] == ["sequence", "classification", "model_configuration", "statistics"]
    model = facts["model"]
    platform, backend = ("onnxruntime_onnx", "onnxruntime") if unavailable_reason() else ("unroll_kernel", "unroll")
    assert (model["name"], model["versions"], model["platform"]) == ("jv", ["1"], platform)
    tensors = {each["name"]: (each["datatype"], list(map(int, each["shape"]))) for each in model["inputs"]}
    assert tensors == {
        "input": ("FP32", [-1, -1, 12]),
        "lengths": ("INT32", [-1]),
        "initial_state": ("FP32", [-1, 1, 128]),
    }
    outputs = {each["name"]: (each["datatype"], list(map(int, each["shape"]))) for each in model["outputs"]}
    assert outputs == {
        "logits": ("FP32", [-1, 9]),
        "probabilities": ("FP32", [-1, 9]),
        "states": ("FP32", [-1, -1, 128]),
        "final_state": ("FP32", [-1, 1, 128]),
    }
    assert facts["index"]["models"] == [{"name": "jv", "version": "1", "state": "READY"}]
    config = facts["config"]
    assert (config["name"], config["backend"], config.get("max_batch_size", 0)) == ("jv", backend, 0)
    assert [list(map(int, each["dims"])) for each in config["input"]] == [[-1, -1, 12], [-1], [-1, 1, 128]]
    assert [each["name"] for each in config["input"] if each.get("optional")] == ["lengths", "initial_state"]
    assert config["parameters"]["class_labels"]["string_value"].split("\n") == list(trained_run.class_labels)


@pytest.mark.parametrize("call", ["load", "unload", "shared_memory"])
def test_what_is_not_offered_here_is_unimplemented(answers: Answers, call: str) -> None:
    status, message = answers.facts["described"][call]
    assert status == "StatusCode.UNIMPLEMENTED"
    assert call == "shared_memory" or "--admin" in message


def test_a_ragged_batch_has_classify_s_bits_and_eager_s_states(
    answers: Answers, classified: Classified, trained_run: TrainedRun, vowels: list[Sequence]
) -> None:
    logits, probabilities, final = classified
    np.testing.assert_array_equal(answers.array("ragged", "logits"), logits)
    np.testing.assert_array_equal(answers.array("ragged", "probabilities"), probabilities)
    np.testing.assert_array_equal(answers.array("ragged", "final_state")[:, 0], final)
    states = answers.array("ragged", "states")
    for row, sequence in zip(states, vowels[:COUNT], strict=True):
        _, expected = eager(trained_run, sequence.values)
        assert np.abs(row[: len(expected)] - expected).max() <= TOLERANCE
        assert not row[len(expected) :].any()
    meta = answers.facts["ragged"]["meta"]
    assert (meta["id"], meta["version"]) == ("r1", "1")
    assert [name for name, _, _ in meta["outputs"]] == ["states", "final_state", "probabilities", "logits"]


def test_logits_and_probabilities_are_what_is_given_by_default(answers: Answers, classified: Classified) -> None:
    assert answers.facts["default_outputs"]["names"] == ["logits", "probabilities"]
    np.testing.assert_array_equal(answers.array("default_outputs", "logits"), classified[0][:1])
    np.testing.assert_array_equal(answers.array("default_outputs", "probabilities"), classified[1][:1])


def test_a_batch_goes_on_from_the_final_states_of_another(answers: Answers, classified: Classified) -> None:
    np.testing.assert_array_equal(answers.array("resumed", "logits"), classified[0])
    np.testing.assert_array_equal(answers.array("resumed", "final_state")[:, 0], classified[2])


def test_classification_names_the_most_probable(
    answers: Answers, classified: Classified, trained_run: TrainedRun
) -> None:
    facts = answers.facts["classification"]
    for row, probabilities in zip(facts["classes"], classified[1], strict=True):
        order = np.argsort(-probabilities, kind="stable")[:3]
        assert row == [f"{probabilities[each]:f}:{each}:{trained_run.class_labels[each]}" for each in order]
    assert facts["all"] == [COUNT, 9]


@pytest.mark.parametrize(
    ("call", "name"), [("callbacks", "logits"), ("with_asyncio", "logits"), ("with_asyncio", "streamed")]
)
def test_calls_at_once_and_an_asyncio_stream_have_classify_s_bits(
    answers: Answers, classified: Classified, call: str, name: str
) -> None:
    np.testing.assert_array_equal(answers.array(call, name), classified[0])


def test_a_sequence_by_single_calls_under_a_number_is_not_that_under_the_same_text(
    answers: Answers, classified: Classified
) -> None:
    np.testing.assert_array_equal(answers.array("unary_sequences", "number"), classified[0][:1])
    np.testing.assert_array_equal(answers.array("unary_sequences", "text"), classified[0][1:2])
    status, message = answers.facts["unary_sequences"]["ended"]
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert "sequence_start" in message


def test_sequences_interleave_on_a_stream_and_a_repeated_start_restarts(
    answers: Answers, classified: Classified, trained_run: TrainedRun, vowels: list[Sequence]
) -> None:
    for index, sequence in enumerate(vowels[:COUNT]):
        np.testing.assert_array_equal(
            answers.array("stream_sequences", f"logits{index}"), classified[0][index : index + 1]
        )
        states = answers.array("stream_sequences", f"states{index}")
        assert np.abs(states - eager(trained_run, sequence.values)[1]).max() <= TOLERANCE
        np.testing.assert_array_equal(states, answers.array("ragged", "states")[index, : len(sequence.values)])


def test_a_sequence_is_its_id_s_not_its_stream_s(answers: Answers, classified: Classified) -> None:
    np.testing.assert_array_equal(answers.array("across_streams", "logits"), classified[0][2:3])
    np.testing.assert_array_equal(answers.array("across_streams", "final_state")[0], classified[2][2:3])


def test_a_refused_request_is_an_answer_and_the_stream_lives_on(answers: Answers, classified: Classified) -> None:
    facts = answers.facts["stream_errors"]
    assert len(facts["errors"]) == 3
    for part in ("sequence 99 has not begun", "has 5 features", "no output 'nothing'"):
        assert any(part in message for message in facts["errors"])
    np.testing.assert_array_equal(answers.array("stream_errors", "logits"), classified[0][[0, 0]])
    assert facts["final"] == [["good", True], ["empty", True]]


def test_a_stream_that_asks_for_it_ends_with_the_code_of_its_first_error(
    answers: Answers, classified: Classified
) -> None:
    code, message = answers.facts["stream_status"]["error"]
    assert code == "StatusCode.INVALID_ARGUMENT"
    assert "sequence 99 has not begun" in message
    for name in ("logits", "int32"):
        np.testing.assert_array_equal(answers.array("stream_status", name), classified[0][:1])


@pytest.mark.parametrize(
    ("case", "code", "part"),
    [
        ("model", "NOT_FOUND", "'nothing' is not served"),
        ("version", "NOT_FOUND", "/7 is not served"),
        ("metadata", "NOT_FOUND", "'nothing' is not served"),
        ("no version", "INVALID_ARGUMENT", "'x' is not a version"),
        ("input", "INVALID_ARGUMENT", "no input 'nothing'"),
        ("missing", "INVALID_ARGUMENT", "`input` is missing"),
        ("type", "INVALID_ARGUMENT", "`input` is FP32, not 'INT64'"),
        ("rank", "INVALID_ARGUMENT", "3 dimensions expected"),
        ("features", "INVALID_ARGUMENT", "has 5 features, jv/1 takes 12"),
        ("lengths", "INVALID_ARGUMENT", "`lengths` gives 118 for sequence 0"),
        ("length 0", "INVALID_ARGUMENT", "`lengths` gives 0 for sequence 0"),
        ("batches", "INVALID_ARGUMENT", "`lengths` is for 1 sequences"),
        ("not finite", "INVALID_ARGUMENT", "sequence 1, step 0, feature 3 is not finite"),
        ("state", "INVALID_ARGUMENT", "`initial_state` is [2, 1, 5]"),
        ("output", "INVALID_ARGUMENT", "no output 'nothing'"),
        ("twice", "INVALID_ARGUMENT", "named twice"),
        ("parameter", "INVALID_ARGUMENT", "parameters[mode]: unknown"),
        ("shared memory", "INVALID_ARGUMENT", "shared memory is not supported"),
        ("states have no classes", "INVALID_ARGUMENT", "`states` has no classes"),
    ],
)
def test_a_wrong_request_says_what_is_wrong(answers: Answers, case: str, code: str, part: str) -> None:
    status, message = answers.facts["errors"][case]
    assert status == f"StatusCode.{code}"
    assert part in message


def test_who_leaves_is_let_go_and_others_are_answered(answers: Answers, classified: Classified) -> None:
    facts = answers.facts["cancelled"]
    assert (facts["call"], facts["stream"]) == ("StatusCode.CANCELLED", "StatusCode.CANCELLED")
    assert facts["timeout"][0] == facts["server timeout"][0] == "StatusCode.DEADLINE_EXCEEDED"
    np.testing.assert_array_equal(answers.array("cancelled", "logits"), classified[0][:1])


def test_statistics_count_what_was_asked(answers: Answers) -> None:
    before, after = (answers.facts["statistics"][name] for name in ("before", "after"))

    def grown(*path: str) -> int:
        values = []
        for statistics in (before, after):
            value: Any = statistics
            for name in path:
                value = value.get(name, {})
            values.append(int(value))
        return values[1] - values[0]

    assert grown("inference_count") == COUNT
    assert grown("execution_count") >= 1
    assert grown("inference_stats", "success", "count") == grown("inference_stats", "fail", "count") == 1
    for stage in ("success", "fail", "compute_input", "compute_infer", "compute_output"):
        assert grown("inference_stats", stage, "ns") > 0
    assert grown("last_inference") >= 0
