"""A repository of small models."""

from pathlib import Path

import pytest
from support import bundles


@pytest.fixture
def root(exported: list[Path], tmp_path: Path) -> Path:
    """A repository that holds `m/1`."""
    bundles.publish(exported[0], tmp_path / "models", "m", 1)
    return tmp_path / "models"
