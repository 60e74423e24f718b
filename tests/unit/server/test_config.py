"""Settings: checked, and the same in another process."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.settings import SETTINGS

from unroll_server.config import Settings
from unroll_server.errors import StartupError


@pytest.mark.parametrize("address", ["", "50051", ":50051", "host:", "host:-1", "host:65536", "host:http", "host:٣"])
@pytest.mark.parametrize("option", ["listen", "metrics"])
def test_an_address_that_is_none_is_refused(option: str, address: str) -> None:
    with pytest.raises(StartupError, match=f"--{option}: .* is not HOST:PORT"):
        replace(SETTINGS, listen=address) if option == "listen" else replace(SETTINGS, metrics=address)


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("127.0.0.1:0", "127.0.0.1", 0), ("[::1]:65535", "::1", 65535), ("localhost:1", "localhost", 1)],
)
def test_an_address_is_taken_apart(address: str, host: str, port: int) -> None:
    settings = replace(SETTINGS, listen=address, metrics=address)
    assert settings.listen_address == (host, port)
    assert settings.metrics_address == (host, port)


def test_settings_are_the_same_in_another_process() -> None:
    settings = replace(SETTINGS, models=Path("/models/with ü"), workers=3, front="envoy", metrics="[::]:9090")
    assert Settings.from_json(settings.to_json()) == settings
    assert Settings.from_json(SETTINGS.to_json()) == SETTINGS
    assert SETTINGS.metrics_address is None


@pytest.mark.parametrize(("versions", "kept"), [("all", None), ("latest", 1), ("latest:1", 1), ("latest:12", 12)])
def test_which_versions_are_served(versions: str, kept: int | None) -> None:
    assert replace(SETTINGS, versions=versions).versions_kept == kept


@pytest.mark.parametrize("versions", ["", "newest", "latest:", "latest:0", "latest:-1", "latest:x", "ALL"])
def test_other_versions_are_refused(versions: str) -> None:
    with pytest.raises(StartupError, match="--versions"):
        replace(SETTINGS, versions=versions)
