"""The simulation of streams: what a queue must do, whatever the figures are."""

import numpy as np
from click.testing import CliRunner

from unroll_bench.scale import Figures, command, latencies


def test_latency_is_the_tick_s_on_an_idle_core_and_grows_with_the_load() -> None:
    figures = Figures(steps=10_000, unloaded=0.001)
    assert np.isclose(np.median(latencies(0.001, figures, 2000)), 0.001)
    means = [latencies(load, figures, 20_000).mean() for load in (0.1, 0.5, 0.9, 1.5)]
    assert means == sorted(means)
    assert all((latencies(load, figures, 2000) > 0).all() for load in (0.1, 2.0))


def test_the_tables_follow_the_figures() -> None:
    output = CliRunner().invoke(command, ["--steps", "1000000", "--price", "1"]).output
    assert "| 50% | 2 |" in output
    assert "0.87 TB are read" in output
