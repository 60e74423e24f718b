"""The catalog: the version for a request."""

import pytest
from support.models import random_network, served

from unroll_engine.errors import InvalidRequestError, ModelNotFoundError
from unroll_server.repository.catalog import Catalog
from unroll_server.repository.version import VersionState

NETWORK = random_network()
OLD, NEW, OTHER = (served(NETWORK, name, version) for name, version in (("m", 1), ("m", 2), ("other", 7)))


def test_a_request_gets_the_version_that_it_names_else_the_newest_of_the_only_model() -> None:
    catalog = Catalog([OLD, NEW])
    assert [catalog.find(name, version).model for name, version in (("", 0), ("m", 0), ("m", 1), ("", 2))] == [
        NEW,
        NEW,
        OLD,
        NEW,
    ]
    assert catalog.models == [OLD, NEW]


@pytest.mark.parametrize(
    ("name", "version", "error", "message"),
    [
        ("", 0, InvalidRequestError, "open.model: required when several are served (m, other)"),
        ("x", 0, ModelNotFoundError, "open.model: 'x' is not served; choose from: m, other"),
        ("m", 3, ModelNotFoundError, "open.version: m/3 is not served; choose from: 1, 2"),
    ],
)
def test_an_error_names_the_field_and_the_choice(name: str, version: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        Catalog([OLD, NEW, OTHER]).find(name, version, "open.model")
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["", "m"])
def test_without_models_nothing_is_found(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no model is"):
        Catalog().find(name, 0)


def test_a_draining_version_is_found_by_work_that_resumes_on_it_until_it_is_removed() -> None:
    catalog = Catalog([OLD, NEW])
    version = catalog.find("m", 1)
    catalog.retire(version)
    assert (catalog.models, catalog.draining, version.state) == ([NEW], [version], VersionState.DRAINING)
    assert catalog.idle.is_set()
    assert catalog.find("m", 1, resumes=b"") is version
    with pytest.raises(ModelNotFoundError):
        catalog.find("m", 1)
    # Only a request that names the version gets it.
    assert catalog.find("m", 0, resumes=b"").model is NEW
    catalog.remove(version)
    assert version.state is VersionState.UNLOADED
    with pytest.raises(ModelNotFoundError):
        catalog.find("m", 1, resumes=b"")


def test_the_latest_of_several_draining_versions_of_one_number_is_found() -> None:
    first, second, third = (served(NETWORK, "m", 1) for _ in range(3))
    catalog = Catalog([first])
    versions = [catalog.find("m", 1), catalog.add(second), catalog.add(third)]
    assert catalog.draining == versions[:2]
    catalog.retire(versions[2])
    assert catalog.find("m", 1, resumes=b"unknown") is versions[2]
    catalog.remove(versions[2])
    assert catalog.find("m", 1, resumes=b"unknown") is versions[1]
