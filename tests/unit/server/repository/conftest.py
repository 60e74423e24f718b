"""A repository of small models."""

from pathlib import Path

import pytest
from support import bundles
from support.models import random_network


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Bundles of two networks of the same sizes and different weights."""
    root = tmp_path_factory.mktemp("exported")
    return [bundles.export(random_network(seed=seed), root) for seed in range(2)]


@pytest.fixture
def root(exported: list[Path], tmp_path: Path) -> Path:
    """A repository that holds `m/1`."""
    bundles.publish(exported[0], tmp_path / "models", "m", 1)
    return tmp_path / "models"
