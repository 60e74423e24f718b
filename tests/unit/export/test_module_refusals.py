"""`unroll_export.export`: modules that have no steps, or whose steps are wrong, are refused with the part at fault."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.modules import CLASSES, FEATURES, Recurrent, Stack, stack
from torch import Tensor, nn

from unroll_export import export
from unroll_export.parity.runners import ParityError
from unroll_export.steps.eager_module import EagerModule
from unroll_export.steps.importing import import_step
from unroll_export.steps.plan import Options
from unroll_export.steps.sequences import Stepped
from unroll_export.steps.step_module import StepModule
from unroll_export.weight_files import ImportRefusedError
from unroll_proto.bundle import BundleError


class Pooling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True).expand_as(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x, x, x)[0]
        return y


class Inverse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.linalg.inv(x[..., None, None] + 3)[..., 0, 0]
        return y


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.abs().max() < 100 else x * 0


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.transpose(1, 2)).transpose(1, 2)
        return y


class ByValues(nn.Module):
    """A recurrent layer that begins with the mean of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(FEATURES, FEATURES, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.recurrent(x, x.mean(1)[None])[0]
        return y


class Centred(ByValues):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.recurrent(x - x.mean(1, keepdim=True))[0]
        return y


class Packed(ByValues):
    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), x.shape[1]), batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)[0]


def with_part(part: nn.Module) -> Stack:
    return Stack([nn.GRU(FEATURES, 6, batch_first=True), part, nn.Linear(6, CLASSES)])


@pytest.mark.parametrize(
    ("network", "error", "problem"),
    [
        (
            with_part(Pooling()),
            ParityError,
            r"for the first 2 steps .*the first difference is in what 'layers.1' \(Pooling\) gives",
        ),
        (with_part(Attention()), ParityError, r"difference is in what 'layers.1.inner' \(MultiheadAttention\) gives"),
        (with_part(Convolution()), ParityError, r"difference is in what 'layers.1.inner' \(Conv1d\) gives"),
        (with_part(Inverse()), ImportRefusedError, r"torch can't export 'layers.1' \(Inverse\): .*linalg_inv"),
        (
            with_part(Branch()),
            ImportRefusedError,
            r"'layers.1' \(Branch\): decides by a tensor's value",
        ),
        (with_part(nn.LayerNorm([9, 6])), ImportRefusedError, r"doesn't run on \[2, 5, 4\]: 'layers.1' \(LayerNorm\)"),
        (
            Stack([nn.LSTM(FEATURES, 6, bidirectional=True, batch_first=True)]),
            ImportRefusedError,
            "output 'output': has a value for each step",
        ),
        (Stack([nn.Linear(FEATURES, 2)]), ImportRefusedError, "no recurrent layer is run"),
        (ByValues(), ImportRefusedError, "state 'recurrent_h': begins with what depends on the values"),
        (Centred(), ParityError, r"difference is in what 'recurrent' \(GRU\) takes"),
        (Packed(), ImportRefusedError, r"'recurrent' \(GRU\): takes packed sequences"),
    ],
)
def test_what_has_no_steps_is_refused_with_the_part(
    tmp_path: Path, network: nn.Module, error: type[Exception], problem: str
) -> None:
    torch.manual_seed(0)
    with pytest.raises(error, match=problem):
        export(network, name="m", example=torch.randn(2, 9, FEATURES), models=tmp_path)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("example", [torch.zeros(3), torch.zeros(0, 2, 4), torch.full((1, 2, 4), torch.nan)])
def test_examples_that_are_no_sequences_are_refused(tmp_path: Path, example: Tensor) -> None:
    with pytest.raises(ImportRefusedError, match="example: "):
        export(stack([Recurrent(nn.GRU, 3)]), name="m", example=example, models=tmp_path)


def test_several_inputs_are_refused_with_the_way_out(tmp_path: Path) -> None:
    example: Any = (torch.randn(2, 9, FEATURES), torch.tensor([9, 3]))
    with pytest.raises(ImportRefusedError, match=r"example: a tuple, one tensor expected: .* give them a default"):
        export(stack([Recurrent(nn.GRU, 3)]), name="m", example=example, models=tmp_path)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    network: Any = torch.jit.script(nn.GRU(FEATURES, 3))
    with pytest.raises(ImportRefusedError, match="module: TorchScript; pass the nn"):
        export(network, name="m", example=torch.zeros(1, 9, FEATURES), models=tmp_path)


@pytest.mark.parametrize("name", ["../m", "a/b", ""])
def test_names_that_are_no_model_s_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError):
        export(
            stack([Recurrent(nn.GRU, 3)]), name=name, example=torch.zeros(1, 9, FEATURES), models=tmp_path / "models"
        )
    assert not [*tmp_path.iterdir()]


def gates(network: Stack, order: list[int]) -> None:
    layer: Any = network.layers[0]
    rows = torch.arange(24).reshape(4, 6)[order].reshape(-1)
    layer.weight_hh_l0.data = layer.weight_hh_l0.data[rows]


def layers(network: Stack) -> None:
    network.layers[0], network.layers[1] = network.layers[1], network.layers[0]


def crossed(stepped: Stepped) -> None:
    """Exchanges the next values of the states."""
    model = stepped.source.model
    names = [f"{state}_next" for state in stepped.states]
    other = dict(zip(names, names[::-1], strict=True))
    for node in model.graph.node:
        for each in (node.input, node.output):
            each[:] = [other.get(name, name) for name in each]


@pytest.mark.parametrize(
    "plant", [lambda network: gates(network, [1, 0, 2, 3]), lambda network: gates(network, [0, 1, 3, 2]), layers, None]
)
def test_the_steps_of_another_network_are_refused_by_the_proof(
    tmp_path: Path, plant: Callable[[Stack], object] | None
) -> None:
    parts: list[Recurrent | str] = [Recurrent(nn.LSTM, 6)]
    # Two layers of one width, which can be exchanged.
    parts = [Recurrent(nn.LSTM, 4), Recurrent(nn.LSTM, 4)] if plant is layers else parts
    network, other = (stack(parts) for _ in range(2))
    example = torch.randn(2, 9, FEATURES)
    if plant:
        plant(other)
    stepped = StepModule(EagerModule(other, example)).stepped()
    if not plant:
        assert stepped.states == ("layers_0_h", "layers_0_c")
        crossed(stepped)
    stepped = stepped._replace(original=EagerModule(network, example))
    with pytest.raises(ParityError, match=r"output 'output' for the first [1-9] steps is not what the steps give"):
        import_step(stepped.source, Options(), tmp_path / "m", stepped=stepped)
