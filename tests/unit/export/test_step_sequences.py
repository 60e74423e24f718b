"""Graphs of whole sequences become graphs of one timestep, or are refused by the proof or with a message."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper
from support.step_graphs import I64, changed, graph, import_graph, source
from support.torch_graphs import exported
from torch import nn

from unroll_engine import Engine, Snapshot
from unroll_engine.models.spec import Float32Array
from unroll_engine.runtimes.step import StepRuntime
from unroll_export.parity.runners import ParityError
from unroll_export.steps.importing import step_graph
from unroll_export.steps.inspecting import report
from unroll_export.steps.plan import Options
from unroll_export.steps.proof import own_steps
from unroll_export.steps.sequence_graph import prove_prefixes
from unroll_export.weight_files import ImportRefusedError
from unroll_proto.bundle import verify_bundle

FEATURES, CLASSES = 4, 3
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@dataclass(frozen=True)
class Stack:
    """A network of recurrent layers, as several frameworks export it."""

    operators: tuple[str, ...]
    hidden: int = 6
    between: str = ""
    batch_first: bool = True
    last: bool = False
    reset_after: int = 0
    bias: bool = True
    begun: bool = False
    batch: str | int = "b"
    seed: int = 0


def sequence_graph(stack: Stack, tail: tuple[NodeProto, ...] = (), **attributes: Any) -> bytes:
    """The ONNX of a stack; `tail` takes `states`, [time, batch, hidden], to `y` in place of the readout."""
    rng = np.random.default_rng(stack.seed)
    tensors: dict[str, NDArray[Any]] = {}

    def weights(name: str, *shape: int) -> str:
        tensors[name] = (rng.standard_normal(shape) * 0.5).astype(np.float32)
        return name

    tensors |= {"one": np.array([1], np.int64), "end": np.array(-1, np.int64), "zero": np.array([0], np.int64)}
    nodes, value, width = [], "x", FEATURES
    if stack.batch_first:
        nodes.append(helper.make_node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]))
        value = "xt"
    for layer, operator in enumerate(stack.operators):
        gates, hidden = GATES[operator], stack.hidden
        inputs = [
            value,
            weights(f"W{layer}", 1, gates * hidden, width),
            weights(f"R{layer}", 1, gates * hidden, hidden),
        ]
        inputs.append(weights(f"B{layer}", 1, 2 * gates * hidden) if stack.bias else "")
        if stack.begun:
            # A learned state, expanded to the batch, as of a framework that has parameters for it.
            nodes += [
                helper.make_node("Shape", ["x"], [f"shape{layer}"]),
                helper.make_node(
                    "Gather", [f"shape{layer}", "one" if not stack.batch_first else "zero"], [f"b{layer}"]
                ),
            ]
            tensors["hidden"] = np.array([hidden], np.int64)
            nodes.append(helper.make_node("Concat", ["one", f"b{layer}", "hidden"], [f"s{layer}"], axis=0))
            nodes.append(helper.make_node("Expand", [weights(f"h{layer}", 1, 1, hidden), f"s{layer}"], [f"hb{layer}"]))
            inputs += ["", f"hb{layer}"] + ([f"hb{layer}"] if operator == "LSTM" else [])
        own: dict[str, Any] = {"linear_before_reset": stack.reset_after} if operator == "GRU" else {}
        nodes.append(helper.make_node(operator, inputs, [f"Y{layer}"], hidden_size=hidden, **own, **attributes))
        nodes.append(helper.make_node("Squeeze", [f"Y{layer}", "one"], [f"v{layer}"]))
        value, width = f"v{layer}", hidden
        if stack.between and layer < len(stack.operators) - 1:
            extra = [weights("scale", hidden)] if stack.between == "LayerNormalization" else []
            nodes.append(helper.make_node(stack.between, [value, *extra], [f"n{layer}"]))
            value = f"n{layer}"
    nodes.append(helper.make_node("Identity", [value], ["states"]))
    readout = [
        helper.make_node("MatMul", ["states", weights("V", stack.hidden, CLASSES)], ["y" if stack.last else "yt"])
    ]
    if stack.last:
        nodes.append(helper.make_node("Gather", [value, "end"], ["ended"], axis=0))
        readout[0].input[0] = "ended"
    else:
        readout.append(helper.make_node("Transpose", ["yt"], ["y"], perm=[1, 0, 2] if stack.batch_first else [0, 1, 2]))
    shape = [stack.batch, "t", FEATURES] if stack.batch_first else ["t", stack.batch, FEATURES]
    return graph([*nodes, *(tail or readout)], {"x": shape}, {"y": None}, tensors)


def original(content: bytes, values: Float32Array, batch_first: bool) -> NDArray[Any]:
    """The output of the graph as it is on one sequence [time, features]."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    laid_out = values[np.newaxis] if batch_first else values[:, np.newaxis]
    found: NDArray[Any] = session.run(["y"], {"x": laid_out})[0]
    return found.reshape(-1, CLASSES)


STACKS = st.builds(
    Stack,
    operators=st.lists(st.sampled_from(["RNN", "GRU", "LSTM"]), min_size=1, max_size=3).map(tuple),
    hidden=st.integers(1, 20),
    between=st.sampled_from(["", "Relu", "LayerNormalization"]),
    batch_first=st.booleans(),
    last=st.booleans(),
    reset_after=st.integers(0, 1),
    bias=st.booleans(),
    begun=st.booleans(),
    seed=st.integers(0, 2**16),
)


@settings(max_examples=30)
@given(stack=STACKS, cut=st.integers(1, 11))
def test_any_stack_gives_what_the_file_gives_stepped_cut_batched_and_resumed(stack: Stack, cut: int) -> None:
    content = sequence_graph(stack)
    values = np.random.default_rng(stack.seed).standard_normal((12, FEATURES)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = import_graph(content, Path(folder), "m", labels=["a", "b", "c"])
        assert verify_bundle(path)[0].step.form == "stepped"
        with Engine.load(path) as engine:
            assert engine.bitwise
            steps = engine.open().advance(values).outputs["y"]
            known = original(content, values, stack.batch_first)
            np.testing.assert_allclose(steps[-1:] if stack.last else steps, known, rtol=1e-4, atol=1e-5)
            sequence = engine.open()
            first = sequence.advance(values[:cut]).outputs["y"]
            resumed = engine.open(Snapshot.from_bytes(sequence.snapshot().to_bytes()))
            assert first.tobytes() == steps[:cut].tobytes()
            assert resumed.advance(values[cut:]).logits.tobytes() == steps[cut:].tobytes() if cut < 12 else True
            batch = engine.classify([values, values[:3], values[:cut]])
            assert batch.logits.tobytes() == steps[[11, 2, cut - 1]].tobytes()


def node(operator: str, *inputs: str, to: str, **attributes: Any) -> NodeProto:
    return helper.make_node(operator, inputs, [to], **attributes)


POOLED = (node("ReduceMean", "states", to="y", axes=[0], keepdims=0),)
ATTENTION = (
    node("ReduceSum", "states", "end1", to="score", keepdims=1),
    node("Softmax", "score", to="weight", axis=0),
    node("Mul", "weight", "states", to="weighted"),
    node("ReduceMean", "weighted", to="y", axes=[0], keepdims=0),
)
NORMALIZED = (
    node("ReduceMean", "states", to="mean", axes=[0], keepdims=1),
    node("Sub", "states", "mean", to="y"),
)


def test_ids_of_tokens_are_sequences_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {"table": (5, 3), "W": (1, 12, 3), "R": (1, 12, 4), "V": (4, 2)}
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in tensors.items()}
    nodes = [
        node("Gather", "table", "ids", to="rows"),
        node("GRU", "rows", "W", "R", to="all", hidden_size=4),
        node("Squeeze", "all", "one", to="states"),
        node("MatMul", "states", "V", to="y"),
    ]
    content = graph(nodes, {"ids": ["t", "b"]}, {"y": None}, values | {"one": np.array([1], np.int64)}, {"ids": I64})
    import_graph(content, tmp_path, "m")
    ids = np.array([4, 0, 3, 3, 1], np.int64)
    with Engine.load(tmp_path / "m") as engine:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        expected = session.run(["y"], {"ids": ids[:, np.newaxis]})[0][:, 0]
        np.testing.assert_allclose(engine.open().advance(ids[:, np.newaxis]).logits, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tail", [POOLED, ATTENTION, NORMALIZED], ids=["pooling", "attention", "normalization"])
def test_what_looks_at_more_than_the_past_is_refused_by_the_proof(tmp_path: Path, tail: tuple[NodeProto, ...]) -> None:
    content = sequence_graph(Stack(("GRU",)), tail)
    if tail is ATTENTION:
        axes = numpy_helper.from_array(np.array([2], np.int64), "end1")
        content = changed(content, lambda model: model.graph.initializer.append(axes))
    with pytest.raises(
        ParityError, match=r"output 'y' for the first [2-9] steps is not what the steps give \(off by 0"
    ):
        import_graph(content, tmp_path, "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Stack(("GRU",), reset_after=1), Stack(("GRU",), reset_after=0)),
        (Stack(("LSTM",)), Stack(("LSTM",), seed=1)),
        (Stack(("RNN", "GRU")), Stack(("GRU", "RNN"))),
        (Stack(("LSTM",), begun=True), Stack(("LSTM",))),
        (Stack(("RNN",), bias=False), Stack(("RNN",))),
    ],
)
def test_the_steps_of_another_network_are_found_by_the_proof(one: Stack, other: Stack) -> None:
    stepped = step_graph(source(sequence_graph(one)), Options()).stepped
    assert stepped is not None
    for stack, fits in ((one, True), (other, False)):
        content, step, *_ = step_graph(source(sequence_graph(stack)), Options())
        steps = own_steps(StepRuntime(content, step), step)
        if fits:
            assert prove_prefixes(stepped.original, lambda values, run=steps: run(values)[0], ["y"]) < 1e-5  # type: ignore[misc]
        else:
            with pytest.raises(ParityError, match="output 'y' for the first"):
                prove_prefixes(stepped.original, lambda values, run=steps: run(values)[0], ["y"])  # type: ignore[misc]


@pytest.mark.parametrize(
    ("operator", "gates"),
    [("LSTM", [1, 0, 2, 3]), ("LSTM", [0, 2, 1, 3]), ("LSTM", [0, 1, 3, 2]), ("GRU", [1, 0, 2]), ("GRU", [0, 2, 1])],
)
def test_exchanged_gates_are_found_by_the_proof(operator: str, gates: list[int]) -> None:
    content = sequence_graph(Stack((operator,)))

    def exchange(model: Any) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == "R0":
                weights = numpy_helper.to_array(tensor).reshape(len(gates), 6, 6)[gates].reshape(1, -1, 6)
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weights), "R0"))

    stepped = step_graph(source(content), Options()).stepped
    wrong = step_graph(source(changed(content, exchange)), Options())
    steps = own_steps(StepRuntime(wrong.content, wrong.step), wrong.step)
    assert stepped is not None
    with pytest.raises(ParityError, match="output 'y' for the first 2 steps"):
        prove_prefixes(stepped.original, lambda values: steps(values)[0], ["y"])


def test_exchanged_states_are_found_by_the_proof() -> None:
    content, step, _, stepped = step_graph(source(sequence_graph(Stack(("LSTM",)))), Options())
    h, c = step.states
    h.next, c.next = c.next, h.next
    steps = own_steps(StepRuntime(content, step), step)
    assert stepped is not None
    with pytest.raises(ParityError, match="output 'y' for the first 2 steps"):
        prove_prefixes(stepped.original, lambda values: steps(values)[0], ["y"])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            sequence_graph(Stack(("LSTM",)), direction="reverse"),
            "LSTM 'Y0': direction reverse: its output at a step",
        ),
        (graph([node("LSTM", "x", "W", "R", to="y", hidden_size=2)], {"x": ["t"]}, {"y": None}, {}), "batch, time"),
    ],
)
def test_what_has_no_steps_is_refused_in_words(content: bytes, problem: str) -> None:
    with pytest.raises(ImportRefusedError, match=problem):
        step_graph(source(content), Options())


def test_a_state_that_depends_on_the_values_is_refused() -> None:
    nodes = [
        node("ReduceMean", "x", to="mean", axes=[0], keepdims=1),
        node("RNN", "x", "W", "R", "", "", "mean", to="states", hidden_size=3),
        node("Identity", "states", to="y"),
    ]
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal((1, 3, 3)).astype(np.float32) for name in "WR"}
    content = graph(nodes, {"x": ["t", "b", 3]}, {"y": None}, tensors)
    with pytest.raises(ImportRefusedError, match="'mean' begins a recurrent node, and depends on the values"):
        step_graph(source(content), Options())


class Network(nn.Module):
    """A typical user's network: recurrent layers, the last step, a readout."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        self.recurrent = kind(FEATURES, 8, **options)  # type: ignore[arg-type]
        self.readout = nn.Linear(8, CLASSES)
        self.batch_first = bool(options.get("batch_first"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.recurrent(self.norm(x))
        ended: torch.Tensor = self.readout(y[:, -1] if self.batch_first else y[-1])
        return ended


@pytest.mark.parametrize("opset", [13, 17, 20])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("batch_first", [True, False])
def test_networks_of_torch_s_exporter_are_stepped(
    tmp_path: Path, kind: type[nn.RNNBase], batch_first: bool, opset: int
) -> None:
    torch.manual_seed(0)
    network = Network(kind, num_layers=2, dropout=0.2, batch_first=batch_first)
    import_graph(exported(network, (2, 5, FEATURES), True, opset), tmp_path, "m", labels=["a", "b", "c"])
    values = torch.randn(9, FEATURES)
    with Engine.load(tmp_path / "m") as engine, torch.no_grad():
        assert engine.bitwise
        expected = network(values[None] if batch_first else values[:, None]).numpy()
        np.testing.assert_allclose(engine.classify([values.numpy()]).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "dynamic", "opset"), [(nn.LSTM, True, 24), (nn.LSTM, False, 18), (nn.GRU, True, 18), (nn.GRU, False, 24)]
)
def test_networks_of_torch_s_newer_exporter_are_stepped(
    tmp_path: Path, kind: type[nn.RNNBase], dynamic: bool, opset: int
) -> None:
    torch.manual_seed(0)
    network = Network(kind, num_layers=2, batch_first=True)
    content = exported(network, (2 if dynamic else 1, 5, FEATURES), dynamic, opset, captured=True)
    import_graph(content, tmp_path, "m", labels=["a", "b", "c"])
    values = torch.randn(9, FEATURES)
    with Engine.load(tmp_path / "m") as engine, torch.no_grad():
        assert engine.bitwise
        expected = network(values[None]).numpy()
        np.testing.assert_allclose(engine.classify([values.numpy()]).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_graph_with_a_copy_of_every_step_is_refused_with_the_way_out(tmp_path: Path) -> None:
    content = exported(Network(nn.RNN, batch_first=True), (1, 5, FEATURES), False, 20, captured=True)
    with pytest.raises(ImportRefusedError, match=r"copy of every step, .*: unroll_export\.export takes the module"):
        import_graph(content, tmp_path, "m")


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_network_of_fixed_sizes_is_widened_in_batch_and_time(tmp_path: Path, batch_first: bool) -> None:
    torch.manual_seed(0)
    network = Network(nn.LSTM, batch_first=batch_first)
    shape = (1, 5, FEATURES) if batch_first else (5, 1, FEATURES)
    manifest, _ = verify_bundle(import_graph(exported(network, shape, False, 17), tmp_path, "m"))
    assert [list(state.tensor.shape) for state in manifest.step.states] == [["1", "batch", "8"]] * 2
    values = torch.randn(11, FEATURES)
    with Engine.load(tmp_path / "m") as engine, torch.no_grad():
        expected = network(values[None] if batch_first else values[:, None]).numpy()
        np.testing.assert_allclose(engine.open().advance(values.numpy()).logits[-1:], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fixed", ["states", "logits"])
def test_sizes_in_a_reshape_are_opened_behind_a_recurrent_node_alone(tmp_path: Path, fixed: str) -> None:
    rng = np.random.default_rng(0)
    shapes = {"W": (1, 18, 4), "R": (1, 18, 6), "V": (6, 2)}
    tensors: dict[str, NDArray[Any]] = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    tensors |= {"states_shape": np.array([5, 1, 6], np.int64), "logits_shape": np.array([5, 2], np.int64)}
    nodes = [
        node("Transpose", "x", to="xt", perm=[1, 0, 2]),
        node("GRU", "xt", "W", "R", to="all", hidden_size=6),
        node("Reshape", "all", "states_shape", to="states"),
        node("MatMul", "states", "V", to="logits" if fixed == "logits" else "y"),
        *([node("Reshape", "logits", "logits_shape", to="y", name="held")] if fixed == "logits" else []),
    ]
    content = graph(nodes, {"x": [1, 5, FEATURES]}, {"y": None}, tensors)
    if fixed == "logits":
        with pytest.raises(
            ImportRefusedError, match="the batch can't be widened to 3: Reshape 'held' holds it; --alone"
        ):
            import_graph(content, tmp_path, "m")
        return
    import_graph(content, tmp_path, "m")
    values = rng.standard_normal((5, FEATURES)).astype(np.float32)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    expected = session.run(["y"], {"x": values[np.newaxis]})[0][:, 0]
    with Engine.load(tmp_path / "m") as engine:
        np.testing.assert_allclose(engine.open().advance(values).logits, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "problem"), [((3, 5, FEATURES), "the batch is fixed at 3"), ((1, 1, FEATURES), "time is fixed at 1")]
)
def test_sizes_that_show_nothing_are_refused(tmp_path: Path, shape: tuple[int, ...], problem: str) -> None:
    with pytest.raises(ImportRefusedError, match=problem):
        import_graph(exported(Network(nn.GRU, batch_first=True), shape, False, 17), tmp_path, "m")


def test_a_report_on_sequences_names_the_states() -> None:
    lines = list(report(source(sequence_graph(Stack(("LSTM", "GRU")))), Path("m.onnx")))
    assert [line.split("'")[1] for line in lines if line.startswith("  state")] == ["lstm0_h", "lstm0_c", "gru1_h"]
    assert lines[-1].split() == ["type", "unroll-export", "import", "m.onnx", "--out", "models/m"]
