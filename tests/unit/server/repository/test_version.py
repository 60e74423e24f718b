"""The life of a version: READY, DRAINING, UNLOADED, and the references of its sequences."""

from hypothesis import given
from hypothesis import strategies as st
from support.models import random_network, served

from unroll_server.repository.version import LoadedVersion, VersionState
from unroll_server.telemetry.metrics import Metrics

MODEL = served(random_network())


@given(before=st.integers(0, 5), after=st.integers(0, 5))
def test_a_draining_version_is_idle_whenever_it_has_lost_its_last_reference(before: int, after: int) -> None:
    idle: list[int] = []
    version = LoadedVersion(MODEL, Metrics(), on_idle=lambda: idle.append(version.references))
    with version.acquired() as model:
        assert (model, version.references) == (MODEL, 1)
    for _ in range(before):
        version.acquire()
    assert idle == []
    version.drain()
    assert idle == ([] if before else [0])
    # A sequence may still resume on it.
    for _ in range(after):
        version.acquire()
    for _ in range(before + after):
        version.release()
    assert idle == ([0] if before or after else []) + ([] if before else [0])
    assert version.acquisitions == 1 + before + after


def test_the_age_of_a_version_begins_anew_with_each_state() -> None:
    now = 1000.0
    version = LoadedVersion(MODEL, Metrics(), clock=lambda: now)
    assert version.state is VersionState.READY
    now += 5
    assert version.age == 5
    version.drain()
    assert (version.state, version.age) == (VersionState.DRAINING, 0)
    now += 7
    version.unload()
    assert (version.state, version.since) == (VersionState.UNLOADED, 1012.0)


def test_states_have_the_names_that_the_wire_has() -> None:
    assert [str(state) for state in VersionState] == ["LOADING", "READY", "LEAVING", "UNLOADED", "REFUSED"]


def test_metrics_count_the_loaded_versions_and_their_open_sequences() -> None:
    metrics = Metrics()
    metrics.of("m/1").serves(1)

    def gauge(name: str) -> list[float]:
        (family,) = [family for family in metrics.collect() if family.name == name]
        return [sample.value for sample in family.samples]

    version = LoadedVersion(MODEL, metrics)
    assert gauge("unroll_model_runtime") == [1]
    version.acquire()
    version.acquire()
    assert gauge("unroll_open_sequences") == [2]
    version.release()
    version.release()
    assert gauge("unroll_open_sequences") == [0]
    version.drain()
    assert gauge("unroll_model_runtime") == [1]
    version.unload()
    assert gauge("unroll_model_runtime") == []
