"""`unroll_export.export`: modules of recurrent layers are served with what eager PyTorch computes."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.modules import CLASSES, FEATURES, PER_STEP, Recurrent, Stack, stack
from torch import Tensor, nn

from unroll_engine import Engine, Snapshot
from unroll_export import SimpleGRU, export
from unroll_proto.bundle import verify_bundle

# torch says so of every LSTM with projections.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

RECURRENT = st.builds(
    Recurrent,
    kind=st.sampled_from([nn.RNN, nn.LSTM, nn.GRU]),
    hidden=st.integers(1, 9),
    layers=st.integers(1, 2),
    bias=st.booleans(),
    projected=st.booleans(),
    relu=st.booleans(),
)
BETWEEN = st.lists(st.sampled_from(list(PER_STEP)), max_size=2)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), batch_first=st.booleans(), last=st.booleans(), cut=st.integers(1, 10))
def test_any_stack_gives_what_the_module_gives_cut_batched_and_resumed(
    data: st.DataObject, batch_first: bool, last: bool, cut: int
) -> None:
    parts: list[Recurrent | str] = ["norm"]
    for layer in data.draw(st.lists(RECURRENT, min_size=1, max_size=2)):
        parts += [*data.draw(BETWEEN), layer]
    network = stack(parts, batch_first, last, data.draw(st.integers(0, 99)))
    values = np.random.default_rng(0).standard_normal((11, FEATURES)).astype(np.float32)
    with tempfile.TemporaryDirectory() as models:
        path = export(network, name="m", example=torch.randn(6, 6, FEATURES), labels=["a", "b", "c"], models=models)
        with Engine.load(path) as engine:
            assert engine.bitwise
            steps = engine.open().advance(values).outputs["output"]
            np.testing.assert_allclose(steps[-1:] if last else steps, network.on(values), rtol=1e-4, atol=1e-5)
            sequence = engine.open()
            first = sequence.advance(values[:cut]).outputs["output"]
            resumed = engine.open(Snapshot.from_bytes(sequence.snapshot().to_bytes()))
            rest = resumed.advance(values[cut:]).outputs["output"]
            assert first.tobytes() + rest.tobytes() == steps.tobytes()
            batch = engine.classify([values, values[:3], values[:cut]])
            assert batch.logits.tobytes() == steps[[10, 2, cut - 1]].tobytes()


def test_the_batch_is_open_where_the_exporter_writes_its_size(tmp_path: Path) -> None:
    network = stack(["batchnorm", "batchnorm", Recurrent(nn.GRU, 3), "batchnorm"])
    path = export(network, name="m", example=torch.randn(2, 6, FEATURES), models=tmp_path)
    values = np.random.default_rng(0).standard_normal((9, FEATURES)).astype(np.float32)
    with Engine.load(path) as engine:
        outputs = engine.open().advance(values).outputs["output"]
        np.testing.assert_allclose(outputs, network.on(values), rtol=1e-4, atol=1e-5)


def test_what_no_sequence_of_the_proof_shows_is_kept(tmp_path: Path) -> None:
    network = Stack([nn.Hardtanh(-9, 9), nn.GRU(FEATURES, 6, batch_first=True), nn.Linear(6, CLASSES)])
    path = export(network, name="m", example=torch.zeros(1, 5, FEATURES), models=tmp_path)
    assert verify_bundle(path)[0].architecture == "step"
    values = np.full((9, FEATURES), 50, np.float32)
    with Engine.load(path) as engine:
        outputs = engine.open().advance(values).outputs["output"]
        np.testing.assert_allclose(outputs, network.on(values), rtol=1e-4, atol=1e-5)
    own = export(SimpleGRU(FEATURES, 6, CLASSES), name="own", example=torch.zeros(1, 5, FEATURES), models=tmp_path)
    assert verify_bundle(own)[0].architecture == "simple_gru"


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # of torch.compile's own imports
def test_modules_that_are_compiled_or_in_float64_are_taken(tmp_path: Path) -> None:
    network = stack(["norm", Recurrent(nn.LSTM, 5)]).double()
    compiled: nn.Module = torch.compile(network)  # type: ignore[assignment]
    values = np.random.default_rng(0).standard_normal((9, FEATURES))
    path = export(compiled, name="m", example=torch.from_numpy(values[None]), models=tmp_path)
    with Engine.load(path) as engine, torch.no_grad():
        outputs = engine.open().advance(values.astype(np.float32)).outputs["output"]
        expected = network.eval()(torch.from_numpy(values)[None])[0].numpy()
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_with_a_readout_get_the_kernel_s_form(
    tmp_path: Path, kind: type[nn.RNN | nn.LSTM | nn.GRU]
) -> None:
    network = stack([Recurrent(kind, 6, 2)], batch_first=False, last=True)
    path = export(network, name="m", example=torch.randn(7, 2, FEATURES), models=tmp_path)
    assert path == tmp_path / "m" / "1"
    manifest, _ = verify_bundle(path)
    assert (manifest.architecture, manifest.training.data) == (f"simple_{kind.__name__.lower()}", "Stack")
    values = np.random.default_rng(0).standard_normal((9, FEATURES)).astype(np.float32)
    with Engine.load(path) as engine:
        np.testing.assert_allclose(engine.classify([values]).logits, network.on(values), rtol=1e-4, atol=1e-5)


class Tagger(nn.Module):
    """Ids to tags, by cells in a loop with an initial state that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, FEATURES)
        self.first, self.second = nn.LSTMCell(FEATURES, 5), nn.GRUCell(5, 6, bias=False)
        self.begin = nn.Parameter(torch.randn(2, 5))
        self.readout = nn.Linear(6, CLASSES)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x, scores, g = self.embedding(ids), [], None
        h, c = (each.expand(len(ids), -1) for each in self.begin)
        for step in range(ids.shape[1]):
            h, c = self.first(x[:, step], (h, c))
            g = self.second(torch.relu(h), g)
            scores.append(self.readout(g))
        given = torch.stack(scores, 1)
        return {"scores": given, "tag": given.argmax(-1)}


def test_cells_in_a_loop_are_stepped_with_outputs_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Tagger()
    path = export(network, name="tags", example=torch.arange(14).reshape(2, 7) % 7, models=tmp_path)
    step = verify_bundle(path)[0].step
    assert [state.tensor.name for state in step.states] == ["first_h", "first_c", "second_h"]
    assert [each.name for each in step.inputs] == ["ids"]
    ids = torch.tensor([[3, 0, 6, 6, 1]])
    with Engine.load(path) as engine, torch.no_grad():
        outputs = engine.open().advance(ids[0, :, None].numpy()).outputs
        expected = network(ids)
    np.testing.assert_allclose(outputs["scores"], expected["scores"][0].numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(outputs["tag"].reshape(-1), expected["tag"][0].numpy())


class Counter(nn.Module):
    """Says whether more values were positive than negative; returns scores of the last step, and the states."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.LayerNorm(8))
        self.memory = nn.LSTM(8, 24, proj_size=12, batch_first=True)
        self.readout = nn.Sequential(nn.Dropout(0.1), nn.Linear(12, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        states, final = self.memory(input=self.encoder(x))
        return self.readout(states[:, -1]), final


def test_a_trained_module_classifies_as_in_pytorch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Counter()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    x = torch.randint(0, 2, (512, 9, 1)) * 2.0 - 1
    y = (x.sum((1, 2)) > 0).long()
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x)[0], y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    path = export(network, name="sign", example=x, labels=["minus", "plus"], models=tmp_path)
    assert network.training
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    with Engine.load(path) as engine, torch.no_grad():
        result = engine.classify([*x.numpy()])
        expected = network.eval()(x)[0]
    # The final states are outputs too: they come after the scores.
    np.testing.assert_allclose(result.logits[:, :2], expected.numpy(), rtol=1e-4, atol=1e-5)
    assert [label == "plus" for label in result.labels] == expected.argmax(1).bool().tolist()
    assert (expected.argmax(1) == y).float().mean() > 0.95
