"""Observability of a server: metrics of every call, log lines, request ids, traces from the client to the tick."""

import json
import re
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families
from support import wire
from support.otlp import Receiver
from support.processes import PATIENCE, ServerProcess
from support.waiting import until

from unroll_proto.sequences import Sequence
from unroll_proto.v1 import unroll_pb2 as pb

OBSERVED = ("--metrics", "127.0.0.1:0", "--log-format", "json", "--access-log", "--workers", "2")
CLASSIFY = "/unroll.v1.UnrollService/Classify"
UNROLL = "/unroll.v1.UnrollService/Unroll"
CONNECTIONS = 16
"""Connections enough for each of two workers to get some."""


@pytest.fixture
def observed(bundle_root: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(bundle_root, tmp_path / "log", *OBSERVED) as process:
        yield process


def exposition(process: ServerProcess) -> str:
    (url,) = re.findall(r'metrics on (http[^\s"]+)', process.log)
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:  # noqa: S310
        text: str = answer.read().decode()
    return text


def handled(process: ServerProcess) -> Counter[tuple[str, str]]:
    """Counts the calls that have ended, by method and code."""
    counted: Counter[tuple[str, str]] = Counter()
    for family in text_string_to_metric_families(exposition(process)):
        for sample in family.samples:
            if sample.name == "grpc_server_handled_total":
                counted[sample.labels["grpc_method"], sample.labels["grpc_code"]] += int(sample.value)
    return counted


def lines(process: ServerProcess, message: str) -> list[dict[str, Any]]:
    said = [json.loads(line) for line in process.log.splitlines()]
    return [line for line in said if line["message"] == message]


async def test_every_call_is_counted_by_method_and_code_over_all_workers(
    observed: ServerProcess, vowels: list[Sequence]
) -> None:
    good = wire.classify_request([vowels[0].values])

    async def code_of(call: Any) -> str:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return caught.value.code().name

    async with AsyncExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(observed.address, options) for _ in range(CONNECTIONS)]
        for channel in channels:
            await stack.enter_async_context(channel)
            stub = wire.stub_of(channel)
            await stub.Classify(good)
            assert await code_of(stub.Classify(wire.classify_request([vowels[0].values], model="no"))) == "NOT_FOUND"
            raw: Any = channel.unary_unary
            assert await code_of(raw("/nothing.Here/AtAll")(b"")) == "UNIMPLEMENTED"
            assert await code_of(raw(CLASSIFY)(b"\xff\xff")) == "INVALID_ARGUMENT"
            requests = [wire.open_request("a"), wire.chunk_request("a", 0, vowels[0].values)]
            await wire.exchange(stub, requests)
            left = stub.Unroll()
            await left.write(wire.open_request("a"))
            await left.read()
            left.cancel()
    expected = Counter(
        {
            ("Classify", "OK"): CONNECTIONS,
            ("Classify", "NotFound"): CONNECTIONS,
            ("Classify", "InvalidArgument"): CONNECTIONS,
            ("unknown", "Unimplemented"): CONNECTIONS,
            ("Unroll", "OK"): 2 * CONNECTIONS,
        }
    )
    # The cancellation by a caller takes a while to arrive; to a servicer that waits for its next message it can look as
    # a normal end.
    await until(lambda: handled(observed).total() >= expected.total(), lambda: handled(observed))
    found = handled(observed)
    found["Unroll", "OK"] += found.pop(("Unroll", "Canceled"), 0)
    assert found == expected
    values = {
        (sample.name, sample.labels.get("grpc_method")): sample.value
        for family in text_string_to_metric_families(exposition(observed))
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }
    assert values["grpc_server_started_total", "Classify"] == 3 * CONNECTIONS
    assert values["grpc_server_msg_received_total", "Unroll"] == 3 * CONNECTIONS
    assert values["grpc_server_msg_sent_total", "Classify"] == CONNECTIONS
    assert values["grpc_server_handling_seconds_count", "Unroll"] == 2 * CONNECTIONS
    assert values["unroll_open_sequences", None] == 0
    assert values["unroll_model_served", None] == values["unroll_model_runtime", None] == 2
    assert values["unroll_queued_steps", None] == 0
    assert observed.stop() == 0, observed.log


async def test_an_open_sequence_is_seen_while_it_is_open(observed: ServerProcess) -> None:
    def is_open() -> float:
        found = re.search(r'^unroll_open_sequences\{model="jv",version="1"\} (\S+)', exposition(observed), re.MULTILINE)
        assert found
        return float(found[1])

    async with grpc.aio.insecure_channel(observed.address) as channel:
        stream = wire.stub_of(channel).Unroll()
        for key in "ab":
            await stream.write(wire.open_request(key))
            await stream.read()
        assert is_open() == 2
        await stream.write(wire.close_request("a"))
        await stream.read()
        assert is_open() == 1
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        assert is_open() == 0


async def test_a_call_has_a_line_with_its_name_and_sizes_and_nothing_that_was_sent(
    observed: ServerProcess, vowels: list[Sequence]
) -> None:
    values = vowels[0].values
    request = wire.classify_request([values, values])
    secret = (("authorization", "Bearer hush-hush"), ("traceparent", "00-" + "5" * 32 + "-" + "5" * 16 + "-01"))
    async with grpc.aio.insecure_channel(observed.address) as channel:
        stub = wire.stub_of(channel)
        call = stub.Classify(request, metadata=(("x-request-id", "mine/1"), *secret))
        await call
        assert dict(await call.trailing_metadata())["x-request-id"] == "mine/1"
        unnamed = stub.Classify(request)
        await unnamed
        given = dict(await unnamed.trailing_metadata())["x-request-id"]
        invalid = stub.Classify(request, metadata=(("x-request-id", "two words"),))
        await invalid
        assert re.fullmatch("[0-9a-f]{32}", str(dict(await invalid.trailing_metadata())["x-request-id"]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Classify(pb.ClassifyRequest(model="no"), metadata=(("x-request-id", "mine/2"),))
        assert dict(caught.value.trailing_metadata() or ())["x-request-id"] == "mine/2"
        stream = stub.Unroll(
            iter([wire.open_request("a"), wire.chunk_request("a", 0, values)]), metadata=(("x-request-id", "mine/3"),)
        )
        answers = [answer async for answer in stream]
        assert dict(await stream.trailing_metadata())["x-request-id"] == "mine/3"
    assert observed.stop() == 0, observed.log
    told = {line["request_id"]: line for line in lines(observed, "call")}
    assert {"mine/1", "mine/2", "mine/3", given} < set(told)
    assert len(told) == 5
    first = told["mine/1"]
    assert (first["logger"], first["level"], first["method"]) == ("unroll_server.access", "INFO", CLASSIFY)
    assert (first["code"], first["steps"]) == ("OK", 2 * len(values))
    assert (first["received"], first["received_bytes"]) == (1, request.ByteSize())
    assert first["sent"] == 1
    assert first["sent_bytes"] > 0
    assert 0 < first["seconds"] < PATIENCE
    assert first["peer"].startswith("ipv4:127.0.0.1:")
    assert told["mine/2"]["code"] == "NOT_FOUND"
    assert told["mine/3"]["method"] == UNROLL
    assert (told["mine/3"]["received"], told["mine/3"]["sent"]) == (2, len(answers))
    assert told["mine/3"]["steps"] == len(values)
    assert "hush" not in observed.log
    assert {name for name, line in told.items() if "trace_id" in line} == {"mine/1"}
    assert first["trace_id"] == "5" * 32
    assert set().union(*told.values()) == {
        *("time", "level", "logger", "message", "request_id", "method", "code", "seconds", "peer", "trace_id"),
        *("received", "received_bytes", "sent", "sent_bytes", "steps"),
    }


async def test_a_call_of_a_method_that_there_is_not_is_named_like_any_other(observed: ServerProcess) -> None:
    async with grpc.aio.insecure_channel(observed.address) as channel:
        call: Any = channel.unary_unary("/nothing.Here/AtAll")
        for metadata in ((("x-request-id", "mine/4"),), ()):
            with pytest.raises(grpc.aio.AioRpcError):
                await call(b"", metadata=metadata)
    assert observed.stop() == 0, observed.log
    first, second = lines(observed, "call")
    assert first["request_id"] == "mine/4"
    assert re.fullmatch("[0-9a-f]{32}", second["request_id"])


async def test_an_access_log_is_written_at_any_level_and_nothing_is_told_unasked(
    bundle_root: Path, tmp_path: Path, vowels: list[Sequence]
) -> None:
    request = wire.classify_request([vowels[0].values])
    for options, said in ((("--access-log", "--log-level", "error"), 1), ((), 0)):
        with ServerProcess(bundle_root, tmp_path / "log", *options) as process:
            async with grpc.aio.insecure_channel(process.address) as channel:
                call = wire.stub_of(channel).Classify(request)
                await call
                assert ("x-request-id" in dict(await call.trailing_metadata())) == bool(said)
                named = wire.stub_of(channel).Classify(request, metadata=(("x-request-id", "me"),))
                await named
                assert dict(await named.trailing_metadata())["x-request-id"] == "me"
            assert process.stop() == 0, process.log
            assert process.log.count("unroll_server.access: call request_id=me ") == said


CLIENT = """
import sys
import numpy as np
from unroll_client import Client
with Client(sys.argv[1]) as client:
    client.classify([np.ones((20, 12)), np.ones((7, 12))])
    with client.unroll() as sequence:
        sequence.send(np.ones((300, 12)))
        sequence.close()
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_trace_goes_from_the_client_through_the_server_to_its_ticks(
    workers: str, bundle_root: Path, tmp_path: Path
) -> None:
    with Receiver() as receiver:
        options = ("--workers", workers)
        with ServerProcess(bundle_root, tmp_path / "log", *options, env=receiver.environment) as process:
            command = [sys.executable, "-W", "error", "-c", CLIENT, process.address]
            done = subprocess.run(
                command, env=receiver.environment, capture_output=True, text=True, timeout=PATIENCE, check=False
            )
            assert done.returncode == 0, done.stderr
            # The server sends the remaining spans when it ends.
            assert process.stop() == 0, process.log
        spans = receiver.until(lambda spans: {name for name, _ in spans} == {"unroll-client", "unroll-server"})
    by_id = {span.span_id: (service, span) for service, span in spans}
    for path, sequences in ((CLASSIFY, 2), (UNROLL, 1)):
        (client,) = (span for service, span in spans if (service, span.name) == ("unroll-client", path[1:]))
        (server,) = (span for service, span in spans if (service, span.name) == ("unroll-server", path[1:]))
        assert client.kind == Span.SPAN_KIND_CLIENT
        assert server.kind == Span.SPAN_KIND_SERVER
        assert server.parent_span_id == client.span_id
        inside = [span for _, span in spans if span.trace_id == client.trace_id and span not in (client, server)]
        assert {span.name for span in inside} == {"unroll.queue", "unroll.tick"}
        assert all(by_id[span.parent_span_id][1] == server for span in inside)
        ticks = [attributes(span) for span in inside if span.name == "unroll.tick"]
        assert all(tick["unroll.model"] == "jv" and tick["unroll.version"] == 1 for tick in ticks)
        assert sum(tick["unroll.real_steps"] for tick in ticks) == (27 if sequences == 2 else 300)
        assert max(tick["unroll.lanes"] for tick in ticks) == sequences
        assert attributes(server)["unroll.ticks"] == len(ticks)
        assert client.start_time_unix_nano <= server.start_time_unix_nano
        assert all(server.start_time_unix_nano <= span.end_time_unix_nano for span in inside)
    allowed = re.compile(
        r"rpc\.(system|service|method|grpc\.status_code)|unroll\.(model|version|lanes|steps|real_steps|ticks|request_id)"
    )
    assert all(allowed.fullmatch(pair.key) for _, span in spans for pair in span.attributes)


def attributes(span: Span) -> dict[str, Any]:
    return {pair.key: pair.value.string_value or pair.value.int_value for pair in span.attributes}


def test_a_receiver_that_is_not_there_disturbs_nobody(bundle_root: Path, tmp_path: Path) -> None:
    with Receiver() as receiver:
        nowhere = receiver.environment
    with ServerProcess(bundle_root, tmp_path / "log", env=nowhere) as process:
        with grpc.insecure_channel(process.address) as channel:
            stub = wire.stub_of(channel)  # type: ignore[arg-type]  # the generated stub serves both kinds of channel
            values = np.zeros((5, 12), np.float32)
            answer: Any = stub.Classify(wire.classify_request([values]), timeout=PATIENCE)
            assert answer.labels
        assert process.stop() == 0, process.log
