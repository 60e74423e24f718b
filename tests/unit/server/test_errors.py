"""Errors fit into the trailers that clients accept, for any input."""

from hypothesis import given
from hypothesis import strategies as st

from unroll_engine.errors import MAX_MESSAGE_BYTES, InvalidRequestError, shortened
from unroll_server.status import status_of


@given(st.text(max_size=50), st.integers(7, 100))
def test_what_fits_is_left_alone_and_the_rest_keeps_its_ends(text: str, most: int) -> None:
    short = shortened(text, most)
    if len(text.encode()) <= most:
        assert short == text
    else:
        assert len(short.encode()) <= most
        begin, end = short.split(" ... ", 1) if text.count(" ... ") == 0 else ("", "")
        assert text.startswith(begin)
        assert text.endswith(end)


def test_a_status_stays_small_whatever_a_caller_called_its_fields() -> None:
    status = status_of(InvalidRequestError(f"no model {'é' * 10**6!r} is served", f"parameters[{'x' * 10**6}]"))
    assert len(status.message.encode()) < 2 * MAX_MESSAGE_BYTES
    assert status.ByteSize() < 4 * MAX_MESSAGE_BYTES
    assert status.message.startswith("parameters[xxx")
    assert status.message.endswith("' is served")
