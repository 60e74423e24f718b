"""The gradient flow: dL/dh_t against an explicit recurrence and finite differences."""

import copy

import numpy as np
import pytest
import torch

from unroll_export import SimpleGRU, SimpleLSTM, SimpleRNN
from unroll_export.gradient_flow import log_gradient_norms, measure, spectral_radii
from unroll_export.metrics import loss_of

LENGTHS = torch.tensor([4, 1, 6])
LABELS = torch.tensor([0, 2, 1])


def model_and_input(layers: int = 1, output_size: int = 3) -> tuple[SimpleRNN, torch.Tensor]:
    torch.manual_seed(5)
    model = SimpleRNN(2, 4, output_size, layers)
    model.mean.copy_(torch.tensor([0.3, -0.2]))
    model.std.copy_(torch.tensor([1.5, 0.5]))
    return model, torch.randn(3, 6, 2)


def test_norms_are_those_of_the_recurrence() -> None:
    model, x = model_and_input()
    norms = log_gradient_norms(model, x, LENGTHS, LABELS).exp().numpy()
    w_hh = model.get_parameter("rnn.weight_hh_l0").detach().double().numpy()
    w_out = model.fc.weight.detach().double().numpy()
    for i, (length, label) in enumerate(zip(LENGTHS.tolist(), LABELS.tolist(), strict=True)):
        with torch.no_grad():
            logits, states, _ = model.unroll(x[i : i + 1, :length])
        h = states[0].double().numpy()
        p = torch.softmax(logits[0, -1].double(), 0).numpy()
        gradient = w_out.T @ (p - np.eye(3)[label])
        expected = np.zeros(6)
        for step in reversed(range(length)):
            expected[step] = np.linalg.norm(gradient)
            gradient = w_hh.T @ ((1 - h[step] ** 2) * gradient)
        np.testing.assert_allclose(norms[:, i], expected, rtol=1e-4)


@pytest.mark.parametrize("output_size", [1, 3])
def test_norms_of_stacked_layers_are_those_of_the_state_handed_on(output_size: int) -> None:
    model, x = model_and_input(layers=2, output_size=output_size)
    labels = LABELS.clamp(max=1)
    norms = log_gradient_norms(model, x, LENGTHS, labels).exp()
    exact = SimpleRNN(2, 4, output_size, 2).double()
    exact.load_state_dict(model.state_dict())
    i, step, eps = 2, 3, 1e-6
    with torch.no_grad():
        _, _, state = exact.unroll(x[i : i + 1, : step + 1].double())
        slopes = []
        for layer in range(2):
            for unit in range(4):
                losses = []
                for sign in (1, -1):
                    moved = state.clone()
                    moved[layer, 0, unit] += sign * eps
                    logits = exact.unroll(x[i : i + 1, step + 1 :].double(), moved)[0][:, -1]
                    losses.append(float(loss_of(logits, labels[i : i + 1])))
                slopes.append((losses[0] - losses[1]) / (2 * eps))
    assert float(norms[step, i]) == pytest.approx(float(np.linalg.norm(slopes)), rel=1e-5)


@pytest.mark.parametrize("cell", [SimpleLSTM, SimpleGRU])
def test_norms_of_gated_cells_are_those_of_all_that_a_step_hands_on(cell: type[SimpleLSTM | SimpleGRU]) -> None:
    torch.manual_seed(3)
    model = cell(2, 4, 3, 2)
    _, x = model_and_input()
    norms = log_gradient_norms(model, x, LENGTHS, LABELS).exp()
    exact = copy.deepcopy(model).double()
    i, step = 2, 3
    with torch.no_grad():
        _, _, state = exact.unroll(x[i : i + 1, : step + 1].double())
    parts = [part.requires_grad_() for part in (state if isinstance(state, tuple) else (state,))]
    rest = parts[0] if len(parts) == 1 else (parts[0], parts[1])
    logits = exact.unroll(x[i : i + 1, step + 1 :].double(), rest)[0][:, -1]  # type: ignore[arg-type]
    gradients = torch.autograd.grad(loss_of(logits, LABELS[i : i + 1]), parts)
    expected = torch.stack(gradients).norm()
    assert float(norms[step, i]) == pytest.approx(float(expected), rel=1e-9)
    assert measure(model, (x, LENGTHS, LABELS), 0).spectral_radius == []


def test_gradients_far_below_the_smallest_double_are_measured() -> None:
    model, _ = model_and_input()
    with torch.no_grad():
        model.get_parameter("rnn.weight_hh_l0").copy_(0.01 * torch.eye(4))
    x = torch.zeros(1, 300, 2)
    flow = measure(model, (x, torch.tensor([300]), torch.tensor([1])), 0)
    decay = flow.decay(299)
    assert decay is not None
    assert decay > 2 * 299


def test_flow_is_averaged_by_distance_from_each_sequences_own_end() -> None:
    model, x = model_and_input()
    norms = log_gradient_norms(model, x, LENGTHS, LABELS).exp()
    flow = measure(model, (x, LENGTHS, LABELS), epoch=7)
    assert flow.epoch == 7
    assert flow.sequences == [3, 2, 2, 2, 1, 1]
    assert 10 ** (flow.log10_norms[0] or 0) == pytest.approx(float(norms[3, 0] + norms[0, 1] + norms[5, 2]) / 3)
    assert 10 ** (flow.log10_norms[2] or 0) == pytest.approx(float(norms[1, 0] + norms[3, 2]) / 2)
    assert 10 ** (flow.log10_norms[5] or 0) == pytest.approx(float(norms[0, 2]))


def test_measuring_changes_nothing() -> None:
    model, x = model_and_input()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure(model, (x, LENGTHS, LABELS), epoch=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_spectral_radius_is_the_largest_eigenvalue_of_each_layer() -> None:
    model = SimpleRNN(1, 2, 2, 2)
    with torch.no_grad():
        model.get_parameter("rnn.weight_hh_l0").copy_(torch.tensor([[0.0, -0.5], [0.5, 0.0]]))  # eigenvalues +-0.5i
        model.get_parameter("rnn.weight_hh_l1").copy_(torch.tensor([[1.0, 5.0], [0.0, -2.0]]))
    assert spectral_radii(model) == pytest.approx([0.5, 2.0])
