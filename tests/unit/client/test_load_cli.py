"""What `unroll bench` refuses, what it says of wrong answers, and its line of progress."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from unroll_client.cli.bench import bench_command
from unroll_client.load import Tally
from unroll_client.load.report import LiveLine
from unroll_proto.sequences import Sequence, write_sequences
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceServicer


def bench(address: str, *words: str, model: str = "m") -> Result:
    options = ["--server", address, "--seconds", "0.3", "--warm-up", "0", "--lengths", "5"]
    if {"--file", "--lengths", "--streams", "--sequences", "--cadence"} & set(words):
        options = options[:-2]
    return CliRunner().invoke(bench_command, [*options, *([] if "--model" in words else ["--model", model]), *words])


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
        (("--streams", "1", "--batch", "3"), "--batch"),
        (("--chunk", "3"), "--chunk"),
        (("--lengths", "3", "--file", "x.npz"), "--lengths and --file"),
        (("--file", "missing.npz"), "missing.npz"),
        (("--model", "nobody"), "nobody"),
        (("--json", "/nowhere/x.json"), "/nowhere/x.json"),
        (("--ca", "/nowhere/ca.pem"), "/nowhere/ca.pem"),
        (("--seconds", "0"), "--seconds"),
    ],
)
def test_bad_input(address: str, words: tuple[str, ...], said: str) -> None:
    done = bench(address, *words)
    assert done.exit_code == 2, done.output
    # Click's own kind of error comes with the usage; ours is one line.
    assert said in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", [".", "nosuch/run.json"])
def test_a_file_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path, name: str) -> None:
    done = bench("127.0.0.1:1", "--json", str(tmp_path / name))
    assert (done.exit_code, "--json" in done.output, "no answer" in done.output) == (2, True, False)


def test_file_of_other_features(address: str, tmp_path: Path) -> None:
    write_sequences(tmp_path / "x.npz", [Sequence("a", np.zeros((4, 2), np.float32), row=1)])
    done = bench(address, "--file", str(tmp_path / "x.npz"))
    assert done.exit_code == 2
    assert "2 features, model m has 3" in done.stderr


def test_wrong_answers_fail(script: Callable[[UnrollServiceServicer], str], tmp_path: Path) -> None:
    """A server whose answers change from one time to the next is told on, by the exit code too."""

    class Changing(UnrollServiceServicer):
        times = 0

        async def GetModel(self, request: Any, context: Any) -> pb.GetModelResponse:  # noqa: N802 (gRPC's name)
            limits = pb.Limits(max_sequences=8, max_steps=64, max_open_sequences=1, max_message_bytes=4096)
            model = pb.Model(
                name="m", version=1, input_size=3, output_size=2, hidden_size=4, bitwise=True, limits=limits
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

        def Unroll(self, requests: Any, context: Any) -> Any:  # noqa: N802 (gRPC's name)
            raise NotImplementedError

        def Advance(self, request: Any, context: Any) -> Any:  # noqa: N802 (gRPC's name)
            raise NotImplementedError

        def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802 (gRPC's name)
            raise NotImplementedError

    # One sequence, so that every call asks the same.
    write_sequences(tmp_path / "x.npz", [Sequence("a", np.zeros((4, 3), np.float32), row=1)])
    done = bench(script(Changing()), "--closed", "1", "--warm-up", "0.5", "--file", str(tmp_path / "x.npz"), model="m")
    assert done.exit_code == 1
    assert "0 errors" in done.stderr
    assert ", 0 wrong" not in done.stderr


def test_what_a_terminal_shows() -> None:
    tally = Tally()
    line = LiveLine(tally, 10.0)
    tally.in_flight = 12
    assert "warming up" in line.text(0.0).plain
    tally.begin = 1.0
    assert "0/10 s" in line.text(1.0).plain
    tally.latencies.extend([0.001] * 500)
    tally.errors["NOT_FOUND"] = 3
    shown = line.text(1.5).plain
    assert "1,000/s" in shown
    assert "12 in flight" in shown
    assert "p50 1 ms  p99 1 ms" in shown
    assert "3 errors  0 wrong" in shown
