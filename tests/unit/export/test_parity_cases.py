"""The cases of the gate: their coverage, and equal cases for equal models."""

import numpy as np
import pytest
import torch
from support.models import random_network

from unroll_export.parity.cases import PLANS, Plan, Values, draw
from unroll_export.parity.runners import EagerRunner


def test_cover_what_is_promised() -> None:
    plain = {(plan.values.time, plan.values.batch) for plan in PLANS if not plan.time_cuts and not plan.batch_cuts}
    assert {(time, batch) for time in (1, 2, 3, 5, 17, 31, 101, 512) for batch in (1, 2, 3, 7)} <= plain
    assert {(time, 64) for time in (1, 2, 3, 5, 17, 31)} <= plain
    chunked = [plan for plan in PLANS if plan.time_cuts]
    assert {1, 2, 3, 17, 300} <= {plan.values.batch for plan in chunked}
    assert any(plan.values.time == 512 for plan in chunked)
    sizes = {int(size) for plan in PLANS if plan.batch_cuts for size in np.diff((0, *plan.batch_cuts))}
    assert {*range(1, 25), 64, 257} <= sizes
    assert any(plan.values.saturate and plan.time_cuts for plan in PLANS)


def test_names_are_distinct() -> None:
    assert len({plan.name for plan in PLANS}) == len(PLANS)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_pieces_cover_the_case_in_order(plan: Plan) -> None:
    for pieces, total in ((plan.chunks, plan.values.time), (plan.groups, plan.values.batch)):
        assert [index for piece in pieces for index in range(total)[piece]] == list(range(total))
        assert all(piece.stop > piece.start for piece in pieces)


def test_values_depend_on_the_arguments_alone() -> None:
    values = Values(7, 9)
    first, again = draw(values, random_network()), draw(values, random_network())
    np.testing.assert_array_equal(first.x, again.x)
    np.testing.assert_array_equal(first.initial_state, again.initial_state)
    assert not np.array_equal(first.x, draw(values._replace(initial_state=True), random_network()).x)


def test_inputs_are_in_the_scale_of_the_data() -> None:
    network = random_network()
    network.mean.copy_(torch.tensor([1000.0, 0.0, -5.0]))
    network.std.copy_(torch.tensor([10.0, 0.01, 1.0]))
    x = draw(Values(batch=64, time=100), network).x
    np.testing.assert_allclose((x.mean((0, 1)) - network.mean.numpy()) / network.std.numpy(), 0, atol=0.1)
    np.testing.assert_allclose(x.std((0, 1)) / network.std.numpy(), 1, atol=0.05)


@pytest.mark.parametrize("sizes", [(12, 128, 9, 1), (1, 16, 2, 1), (200, 64, 2, 1)])
def test_saturating_inputs_saturate(sizes: tuple[int, int, int, int]) -> None:
    network = random_network(*sizes)
    case = draw(Values(batch=8, time=20, saturate=True), network)
    states = EagerRunner(network).run(case.x, case.initial_state).states
    assert (np.abs(states) > 1 - 1e-6).mean() > 0.4
