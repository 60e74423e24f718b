"""The benchmark itself: arithmetic, messages, a report, and no processes left behind."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support.waiting import wait_until

from unroll_bench.contest.figures import Outcome, Spread, Verdict, ratios
from unroll_bench.contest.network import WrongAnswerError
from unroll_bench.contest.rows.row import hold, p99_ms, take_late
from unroll_bench.contest.table import markdown
from unroll_bench.load import Result

PATIENCE = 300.0


@pytest.fixture
def mark() -> Iterator[str]:
    """An environment variable that every process of a run inherits."""
    name = f"MARK_{uuid.uuid4().hex}"
    yield name
    for pid in marked(name):
        os.kill(pid, signal.SIGKILL)


def marked(name: str) -> list[int]:
    """Returns the live processes that have the variable."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            if path.name.isdigit() and name.encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


@contextmanager
def running_bench(out: Path, mark: str, row: str) -> Iterator["subprocess.Popen[str]"]:
    env = {**os.environ, mark: "1"}
    command = [
        sys.executable,
        "-m",
        "unroll_bench.contest",
        "--only",
        row,
        "--rounds",
        "1",
        "--seconds",
        "0.2",
        "--out",
        str(out),
    ]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_row_is_measured_and_reported_and_nothing_stays_behind(tmp_path: Path, mark: str) -> None:
    with running_bench(tmp_path, mark, "latency") as process:
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert not marked(mark)
    (row,) = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert row["key"] == "latency"
    assert not row["problem"]
    assert {figure["contestant"] for figure in row["figures"]} >= {"Unroll, grpcio", "afternoon server"}
    assert all(figure["median"] > 0 for figure in row["figures"])
    # Two of ours, and one of Triton, which was not requested.
    assert len(row["verdicts"]) == 3
    assert "afternoon server" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process(tmp_path: Path, mark: str, number: signal.Signals) -> None:
    with running_bench(tmp_path, mark, "latency") as process:
        # The run and its servers.
        wait_until(lambda: len(marked(mark)) >= 3)
        process.send_signal(number)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == (-signal.SIGKILL if number is signal.SIGKILL else 130)
    wait_until(lambda: not marked(mark))


@pytest.mark.parametrize("option", ["--only", "--peers"])
def test_an_unknown_name_is_refused_in_one_line(option: str) -> None:
    command = [sys.executable, "-m", "unroll_bench.contest", option, "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "nonsense" in done.stderr


def test_a_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5, 1, 3, 2, 4]) == Spread(3, 2, 4)
    assert Spread.of([7]) == Spread(7, 7, 7)
    assert ratios([2, 9], [1, 3]) == [2, 3]


@pytest.mark.parametrize(
    ("samples", "at_least", "met"),
    [([3, 2, 1], True, True), ([3, 1.9, 1], True, False), ([3, 2, 1], False, True), ([3, 2.1, 1], False, False)],
)
def test_a_verdict_holds_the_median_against_the_bar(samples: list[float], at_least: bool, met: bool) -> None:
    assert Verdict("claim", samples, 2, at_least=at_least).met is met


def test_what_was_not_measured_is_not_met_and_says_why() -> None:
    outcome = Outcome("row", "a row", verdicts=[Verdict("claim", [], 2, missing="no compiler here")])
    assert not outcome.verdicts[0].met
    report = markdown({"cpu": "some"}, [outcome])
    assert "not measured" in report
    assert "no compiler here" in report
    assert json.loads(json.dumps(outcome.to_json()))["verdicts"][0]["met"] is False


def result_of(answered: int, **errors: int) -> Result:
    named = Counter({reason.replace("_", " "): count for reason, count in errors.items()})
    return Result(np.full(answered, 0.002), 0.8, answered, named, 0)


def test_calls_that_a_slow_server_leaves_unsent_are_a_measurement() -> None:
    few, many = result_of(995, not_sent=5), result_of(50, not_sent=40, unanswered=10, streams_that_did_not_end=1)
    assert [take_late(few), take_late(many)] == [5, 50]
    for result in (few, many):
        hold("a server", result)
    assert p99_ms(few, 5, 0.8) == pytest.approx(2)
    assert p99_ms(many, 50, 0.8) == pytest.approx(800), "what was left out would have been the slowest"


@pytest.mark.parametrize(
    "errors", [{"UNAVAILABLE": 1}, {"UNAVAILABLE": 1, "not_sent": 3}, {"streams_that_did_not_end": 1}]
)
def test_calls_that_fail_are_still_a_failure_of_the_row(errors: dict[str, int]) -> None:
    result = result_of(100, **errors)
    take_late(result)
    with pytest.raises(WrongAnswerError, match=r"a server: 1 x (UNAVAILABLE|streams that did not end)"):
        hold("a server", result)
