"""What the worker tells Envoy's filter of calls to refuse, by the file that they share."""

import asyncio
import base64
import math
import mmap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
from google.rpc import error_details_pb2, status_pb2

from unroll_server.fronts.gate import DELAYS, FLOOR, LOOK, SHARE, Gate
from unroll_server.fronts.gate_filter import NUMBERS, http_filter
from unroll_server.metrics import Metrics

METHODS = {"/t/B": False, "/t/A": False, "/t/First": True}
SHARE_AT, FLOOR_AT, FULL, REFUSED = 0, 1, 2, 16
BULK, FIRST = 8, 12
PASSED, ENDED, RATE, HORIZON = range(BULK, BULK + 4)
PATIENCE = 30.0


class Books:
    """Books that say what the test says."""

    def __init__(self) -> None:
        self.least = 0.0
        self.full = ""
        self.causes: Counter[str] = Counter()

    def horizon(self, interactive: bool) -> float:
        return 0.0 if interactive else self.least

    def refused(self, cause: str) -> None:
        self.causes[cause] += 1


def opened(path: Path, books: Books, metrics: Metrics) -> tuple[Gate, "memoryview[float]"]:
    """A gate, and its numbers as Envoy sees them."""
    gate = Gate(path, metrics)
    gate.open(books, METHODS)
    with path.open("r+b") as file:
        return gate, memoryview(mmap.mmap(file.fileno(), NUMBERS)).cast("d")


async def until(condition: Callable[[], bool]) -> None:
    """Waits for the gate's next looks."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(LOOK)


async def test_the_file_says_which_methods_are_meant_and_what_a_refusal_says(tmp_path: Path) -> None:
    _, numbers = opened(tmp_path / "gate", Books(), Metrics())
    assert (numbers[SHARE_AT], numbers[FLOOR_AT]) == (SHARE, FLOOR)
    lines = (tmp_path / "gate").read_bytes()[NUMBERS:].decode().splitlines()
    assert lines[:3] == [f"method 0 {BULK} /t/A", f"method 1 {BULK} /t/B", f"method 2 {FIRST} /t/First"]
    refusals = [line.split(" ", 5) for line in lines[3:]]
    assert {fields[0] for fields in refusals} == {"refusal"}
    for reason in ("DEADLINE_TOO_NEAR", "QUEUED_STEPS", "QUEUED_BYTES"):
        chosen = [fields for fields in refusals if fields[1] == reason]
        assert [float(fields[2]) for fields in chosen] == list(DELAYS)
        for _, _, seconds, pushback, details, message in chosen:
            assert int(pushback) == round(float(seconds) * 1000)
            # Binary metadata are base64, here without padding.
            padded = details + "=" * (-len(details) % 4)
            status = status_pb2.Status.FromString(base64.b64decode(padded, validate=True))
            info, delay = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            assert status.message == message
            assert status.details[0].Unpack(info)
            assert info.reason == reason
            assert status.details[1].Unpack(delay)
            assert math.isclose(delay.retry_delay.ToNanoseconds() / 1e9, float(seconds))


async def test_calls_are_counted_and_those_that_left_on_their_way_are_forgotten_when_all_is_quiet(
    tmp_path: Path,
) -> None:
    gate, numbers = opened(tmp_path / "gate", Books(), Metrics())
    assert not gate.enter("/t/Other")
    numbers[PASSED] = 5
    assert gate.enter("/t/A")
    assert gate.enter("/t/B")
    gate.leave("/t/A", answered=True)
    assert numbers[ENDED] == 1
    gate.leave("/t/A", answered=True)
    assert numbers[ENDED] == 2
    await until(lambda: numbers[ENDED] == 5)


async def test_envoy_hears_of_the_horizon_at_once_while_there_is_one_and_in_a_moment_where_there_was_none(
    tmp_path: Path,
) -> None:
    books = Books()
    gate, numbers = opened(tmp_path / "gate", books, Metrics())
    gate.enter("/t/A")
    books.least = 0.7
    await until(lambda: numbers[HORIZON] == 0.7)
    for number, books.full in ((1, "QUEUED_STEPS"), (2, "QUEUED_BYTES")):
        books.least = math.inf
        gate.enter("/t/A")
        assert (numbers[HORIZON], numbers[FULL]) == (math.inf, number)
        gate.leave("/t/A", answered=False)
    books.full = ""
    books.least = 0.0
    gate.leave("/t/A", answered=True)
    assert numbers[HORIZON] == 0.0
    gate.leave("/t/A", answered=True)


async def test_calls_whose_work_goes_first_are_counted_apart(tmp_path: Path) -> None:
    books = Books()
    books.least = 0.7
    gate, numbers = opened(tmp_path / "gate", books, Metrics())
    for _ in range(2 * FLOOR):
        gate.enter("/t/A")
    assert gate.enter("/t/First")

    def one_more() -> bool:
        gate.leave("/t/A", answered=True)
        gate.enter("/t/A")
        return numbers[RATE] > 0

    await until(one_more)
    ended = numbers[ENDED]
    assert ended > 0
    own = {name: place - BULK + FIRST for name, place in (("ended", ENDED), ("rate", RATE), ("horizon", HORIZON))}
    assert [numbers[place] for place in own.values()] == [0.0, 0.0, 0.0]
    assert numbers[HORIZON] == 0.7
    gate.leave("/t/First", answered=True)
    assert numbers[own["ended"]] == 1
    assert numbers[ENDED] == ended


async def test_the_rate_is_told_once_enough_calls_are_in_flight(tmp_path: Path) -> None:
    gate, numbers = opened(tmp_path / "gate", Books(), Metrics())
    for _ in range(2 * FLOOR):
        gate.enter("/t/A")

    def one_more() -> bool:
        gate.leave("/t/A", answered=True)
        gate.enter("/t/A")
        return numbers[RATE] > 0

    await until(one_more)


async def test_what_envoy_refused_is_counted_by_method_and_cause(tmp_path: Path) -> None:
    books, metrics = Books(), Metrics()
    gate, numbers = opened(tmp_path / "gate", books, metrics)
    gate.enter("/t/A")
    numbers[REFUSED] = 3
    numbers[REFUSED + 2] = 1
    numbers[REFUSED + 4] = 2
    await until(lambda: books.causes.total() == 6)
    assert books.causes == {"deadline": 3, "steps": 2, "bytes": 1}
    numbers[REFUSED] = 4
    await until(lambda: books.causes["deadline"] == 4)
    gate.leave("/t/A", answered=True)


def test_the_filter_reads_the_file_whatever_its_name(tmp_path: Path) -> None:
    source = http_filter(tmp_path / "a'b\"c\\n")["typed_config"]["default_source_code"]["inline_string"]
    assert source.startswith(f"local gate_path, gate_numbers = [=[{tmp_path}/a'b\"c\\n]=], {NUMBERS}\n")
    assert "function envoy_on_request" in source
