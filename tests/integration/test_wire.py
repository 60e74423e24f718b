"""gRPC's protocol frame by frame on a real server: every call is answered, with a status."""

import numpy as np
import pytest
from hpack import Decoder
from support import wire
from support.processes import ServerProcess
from support.raw_http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    RST_STREAM,
    Connection,
    frame,
    header_block,
    message,
)
from support.transports import BOTH

pytestmark = BOTH

PATH = "/unroll.v1.UnrollService/Classify"
REQUEST = message(wire.classify_request([np.ones((5, 12), np.float32)]).SerializeToString())
OK, DEADLINE_EXCEEDED = "0", "4"


def ending_of(connection: Connection) -> dict[str, str]:
    """Returns headers and trailers of the first call's answer as one dict; `rst` is the error code of a reset."""
    decoder = Decoder()
    found: dict[str, str] = {}
    for came in connection.frames():
        if came.kind == HEADERS:
            found |= {str(name): str(value) for name, value in decoder.decode(came.payload)}
        if came.stream == 1 and came.kind == RST_STREAM:
            return found | {"rst": str(int.from_bytes(came.payload, "big"))}
        if came.stream == 1 and came.flags & END_STREAM and came.kind in (DATA, HEADERS):
            return found
    raise AssertionError(f"the call has no end: {found}")


@pytest.mark.parametrize("begun", [b"", REQUEST[:3], REQUEST[:20]], ids=["nothing", "half a header", "half a message"])
def test_a_call_whose_request_never_ends_is_over_at_its_deadline(server: ServerProcess, begun: bytes) -> None:
    with Connection(server.address) as connection:
        headers = header_block(PATH, ("grpc-timeout", "100m"))
        connection.send(frame(HEADERS, END_HEADERS, 1, headers), frame(DATA, 0, 1, begun))
        assert ending_of(connection)["grpc-status"] == DEADLINE_EXCEEDED
        connection.send(frame(HEADERS, END_HEADERS, 3, header_block(PATH)), frame(DATA, END_STREAM, 3, REQUEST))
        assert connection.is_alive()


@pytest.mark.parametrize("without", ["", "te"])
def test_no_call_ends_without_a_status(server: ServerProcess, without: str) -> None:
    with Connection(server.address) as connection:
        headers = header_block(PATH, without=without)
        connection.send(frame(HEADERS, END_HEADERS, 1, headers), frame(DATA, END_STREAM, 1, REQUEST))
        ending = ending_of(connection)
    if without:
        # grpcio resets such a call.
        assert "rst" in ending or ending["grpc-status"] not in (OK, "")
    else:
        assert ending["grpc-status"] == OK
