"""The options of `unroll-serve`: what grpcio could not take is refused by name, before anything starts."""

import pytest
from click.testing import CliRunner

from unroll_server.command import command

_SECONDS = ("--drain-timeout", "--models-poll", "--session-ttl", "--max-connection-age", "--keepalive")
_NUMBERS = ("--max-connections", "--max-concurrent-calls", "--max-sequences", "--max-steps", "--max-open-sequences")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((option, value) for option in _SECONDS for value in ("nan", "inf", "1e10", "-1")),
        *((option, value) for option in _NUMBERS for value in (str(2**31 - 1), "5000000000", "0")),
        ("--max-queued-steps", str(2**63)),
        ("--max-queued-bytes", "0"),
    ],
)
def test_a_number_that_can_not_be_is_one_line(option: str, value: str) -> None:
    done = CliRunner().invoke(command, ["--models", "/nowhere", option, value])
    assert done.exit_code == 2
    assert f"Invalid value for '{option}'" in done.output
