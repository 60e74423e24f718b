"""Input that `unroll-bench` refuses, and its report of wrong answers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from support.servicers import PartialServicer

from unroll_bench.cli import command
from unroll_proto.v1 import unroll_pb2 as pb


def bench(address: str, *words: str, model: str = "m") -> Result:
    options = ["--server", address, "--seconds", "0.3", "--warm-up", "0", "--lengths", "5"]
    if {"--lengths", "--streams", "--sequences", "--cadence"} & set(words):
        options = options[:-2]
    return CliRunner().invoke(command, [*options, *([] if "--model" in words else ["--model", model]), *words])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--lengths", "0"), "--lengths"),
        (("--lengths", "65"), "--lengths"),
        (("--batch", "9"), "--batch"),
        (("--batch", "8", "--lengths", "60"), "--batch"),
        (("--closed", "1", "--open", "2"), "--closed and --open"),
        (("--closed", "1", "--cadence", "2"), "--closed and --sequences"),
        (("--sequences", "101"), "--streams"),
        (("--sequences", "2", "--streams", "3"), "--sequences"),
        (("--chunk", "3"), "--chunk"),
        (("--model", "nobody"), "nobody"),
        (("--ca", "/nowhere/ca.pem"), "/nowhere/ca.pem"),
        (("--seconds", "0"), "--seconds"),
    ],
)
def test_bad_input(address: str, words: tuple[str, ...], said: str) -> None:
    done = bench(address, *words)
    assert done.exit_code == 2, done.output
    # Click's own errors include the usage; ours are one line.
    assert said in done.stderr.splitlines()[-1]


def test_wrong_answers_fail(script: Callable[[PartialServicer], str]) -> None:
    """A server whose answers to the same request differ is reported, also by the exit code."""

    class Changing(PartialServicer):
        times = 0

        async def GetModel(self, request: Any, context: Any) -> pb.GetModelResponse:  # noqa: N802 (gRPC's name)
            limits = pb.Limits(max_sequences=8, max_steps=64, max_open_sequences=1, max_message_bytes=4096)
            model = pb.Model(
                name="m",
                version=1,
                input_size=3,
                output_size=2,
                hidden_size=4,
                class_labels=["a", "b"],
                bitwise=True,
                limits=limits,
            )
            return pb.GetModelResponse(model=model)

        async def Classify(self, request: Any, context: Any) -> pb.ClassifyResponse:  # noqa: N802 (gRPC's name)
            self.times += 1
            logits = np.array([[0, self.times % 7]], "<f4")
            shares = np.exp(logits) / np.exp(logits).sum()
            return pb.ClassifyResponse(
                logits=logits.tobytes(),
                probabilities=shares.astype("<f4").tobytes(),
                label_indices=[int(logits.argmax())],
                labels=["b"],
            )

    done = bench(script(Changing()), "--closed", "1", "--warm-up", "0.5")
    assert done.exit_code == 1
    assert "0 errors" in done.stderr
    assert ", 0 wrong" not in done.stderr
