"""Settings: validated, and the same in another process."""

import pytest
from support.settings import SETTINGS

from unroll_server.config import Settings
from unroll_server.errors import StartupError


def test_several_processes_can_not_listen_on_a_unix_socket() -> None:
    assert SETTINGS.replace(listen="unix:/run/x").listen_address.path == "/run/x"
    with pytest.raises(StartupError, match=r"--listen: .* needs --workers 1"):
        SETTINGS.replace(listen="unix:/run/x", workers=2)


def test_settings_are_the_same_in_another_process() -> None:
    settings = SETTINGS.replace(models="/models/with ü", workers=3, metrics="[::]:9090")
    assert Settings.from_json(settings.to_json()) == settings
    assert Settings.from_json(SETTINGS.to_json()) == SETTINGS
    assert SETTINGS.metrics_address is None


@pytest.mark.parametrize(("versions", "kept"), [("all", None), ("latest", 1), ("latest:1", 1), ("latest:12", 12)])
def test_which_versions_are_served(versions: str, kept: int | None) -> None:
    assert SETTINGS.replace(versions=versions).versions_kept == kept


@pytest.mark.parametrize("versions", ["newest", "latest:", "latest:0", "latest:-1", "latest:x", "ALL"])
def test_other_versions_are_refused(versions: str) -> None:
    with pytest.raises(StartupError, match="--versions"):
        SETTINGS.replace(versions=versions)
