"""Import of step graphs: states, proof, refusals and their messages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support.step_graphs import I64, changed, counter, elman, graph, import_graph, source

from unroll_engine import Engine
from unroll_export.parity.runners import ParityError
from unroll_export.steps.importing import import_step, step_graph, verify_step
from unroll_export.steps.inspecting import report
from unroll_export.steps.pairing import find_pairs, stem_of
from unroll_export.steps.plan import Options
from unroll_export.steps.reading import Value
from unroll_export.weight_files import ImportRefusedError
from unroll_proto.bundle import verify_bundle

SHAPE: list[int | str] = ["batch", 3]


def values(*names: str, dims: tuple[int | str, ...] = ("b", 8)) -> list[Value]:
    return [Value(name, np.dtype("float32"), dims) for name in names]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("h", "h_next"),
        ("h0", "hn"),
        ("h_0", "h_n"),
        ("state", "stateN"),
        ("prev_state", "next_state"),
        ("stateIn", "stateOut"),
        ("cache_in", "cache_out"),
        ("cached_len_0", "new_cached_len_0"),
        ("past_key_values.0.key", "present.0.key"),
        ("hidden_state.1", "hidden_state_out.1"),
    ],
)
def test_names_pair_before_and_after(before: str, after: str) -> None:
    assert stem_of(before) == stem_of(after)
    (pair,) = find_pairs(values("x", before), values("y", after))
    assert (pair.before.name, pair.after.name) == (before, after)


def test_shapes_alone_never_pair() -> None:
    assert not find_pairs(values("spectrum"), values("mask"))
    assert not find_pairs(values("input"), values("output"))
    assert not find_pairs(values("cache_1"), values("cache_2"))
    # Two candidates count as none.
    assert not find_pairs(values("h"), values("h_out", "h_next"))
    other = [Value("h_next", np.dtype("float32"), ("b", 9))]
    assert not find_pairs(values("h"), other)
    (pair,) = find_pairs(values("x", "a"), values("y", "b"), {"a": "b"})
    assert pair.reason == "given"


def test_the_bundle_says_what_it_is(tmp_path: Path) -> None:
    content = elman()
    path = import_graph(content, tmp_path, "m")
    manifest, proofs = verify_bundle(path)
    step = manifest.step
    assert (step.source, step.form, step.bitwise, step.alone) == ("m.onnx", "published", True, False)
    assert step.source_sha256 == source(content).sha256
    assert [(each.tensor.name, each.next) for each in step.states] == [("h", "h_next")]
    assert all(not case.bit_differences for case in proofs.proofs[0].cases)
    assert verify_step(path, manifest).bitwise
    assert import_graph(content, tmp_path, "m").name == "2"


def test_layouts_and_dtypes_of_states_are_kept(tmp_path: Path) -> None:
    # The state is [2, batch, 1], as of silero; the values are ids, which an embedding takes.
    nodes = [
        helper.make_node("Gather", ["table", "id"], ["row"]),
        helper.make_node("Unsqueeze", ["row", "first"], ["rows"]),
        helper.make_node("Add", ["s", "rows"], ["s_next"]),
        helper.make_node("ReduceSum", ["s_next", "first"], ["y"], keepdims=0),
    ]
    content = graph(
        nodes,
        {"id": ["batch"], "s": [2, "batch", 1]},
        {"y": ["batch", 1], "s_next": [2, "batch", 1]},
        {"table": np.array([[0.5], [2.0], [8.0]], np.float32), "first": np.array([0], np.int64)},
        {"id": I64},
    )
    import_graph(content, tmp_path, "ids")
    with Engine.load(tmp_path / "ids") as engine:
        assert engine.spec.input_size == 1
        assert engine.open().advance([[0], [1], [2]]).outputs["y"].ravel().tolist() == [1, 5, 21]


def test_a_graph_of_one_step_may_hold_recurrent_operators(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {name: rng.standard_normal((1, 9, 3)).astype(np.float32) for name in "WR"}
    nodes = [
        helper.make_node("Transpose", ["cache"], ["h"], perm=[1, 0, 2]),
        helper.make_node("GRU", ["x", "W", "R", "", "", "h"], ["all", "last"], hidden_size=3),
        helper.make_node("Transpose", ["last"], ["new_cache"], perm=[1, 0, 2]),
        helper.make_node("Squeeze", ["all", "axes"], ["y"]),
    ]
    inputs: dict[str, Any] = {"x": [1, "batch", 3], "cache": ["batch", 1, 3]}
    tensors["axes"] = np.array([0, 1], np.int64)
    content = graph(nodes, inputs, {"y": SHAPE, "new_cache": ["batch", 1, 3]}, tensors)
    manifest, _ = verify_bundle(import_graph(content, tmp_path, "m"))
    assert (manifest.step.form, manifest.step.states[0].next) == ("published", "new_cache")


def test_a_context_is_a_state_of_the_values_before(tmp_path: Path) -> None:
    # y = sum of the last 3 + 2 values; a state beside it, so that there is one.
    nodes = [
        helper.make_node("ReduceSum", ["x", "last"], ["y"], keepdims=1),
        helper.make_node("Identity", ["h"], ["h_next"]),
    ]
    content = graph(
        nodes,
        {"x": ["batch", "n"], "h": ["batch", 1]},
        {"y": ["batch", 1], "h_next": ["batch", 1]},
        {"last": np.array([1], np.int64)},
    )
    import_graph(content, tmp_path, "m", Options(contexts={"x": 3}, chunk=2))
    with Engine.load(tmp_path / "m") as engine:
        steps = engine.open().advance(np.arange(1, 9).reshape(4, 2)).outputs["y"].ravel()
        assert steps.tolist() == [3, 1 + 2 + 3 + 4, 2 + 3 + 4 + 5 + 6, 4 + 5 + 6 + 7 + 8]


def test_an_input_of_a_whole_sequence_is_a_state_that_stays(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["h", "speaker"], ["h_next"]), helper.make_node("Add", ["x", "h"], ["y"])]
    shape = ["batch", 1]
    content = graph(nodes, {"x": shape, "h": shape, "speaker": shape}, {"y": shape, "h_next": shape}, {})
    options = Options(per_sequence=["speaker"], initial={"speaker": np.array([0.5])})
    import_graph(content, tmp_path, "m", options)
    with Engine.load(tmp_path / "m") as engine:
        assert engine.open().advance(np.zeros((4, 1))).outputs["y"].ravel().tolist() == [0, 0.5, 1, 1.5]


def batch_norm() -> bytes:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
        helper.make_node("Add", ["h", "y"], ["h_next"]),
    ]
    shape = ["batch", 2]
    return graph(nodes, {"x": shape, "h": shape}, {"y": shape, "h_next": shape}, {})


def dynamic_int8() -> bytes:
    """A product in int8 with one scale for the batch, as by onnxruntime's quantize_dynamic."""
    rng = np.random.default_rng(3)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "zero"], ["product"]),
        helper.make_node("Cast", ["product"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["number", "scale"], ["y"]),
        helper.make_node("Add", ["h", "y"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["h_next"]),
    ]
    shape: list[int | str] = ["batch", 6]
    tensors = {"w": rng.integers(-9, 9, (6, 6)).astype(np.int8)}
    return graph(nodes, {"x": shape, "h": shape}, {"y": shape, "h_next": shape}, tensors)


@pytest.mark.parametrize("made", [batch_norm, dynamic_int8])
def test_sequences_that_depend_on_each_other_run_alone_or_not_at_all(tmp_path: Path, made: Callable[[], bytes]) -> None:
    content = made()
    with pytest.raises(ParityError, match=r"batch depend on each other \(.* of a batch of \d+ is off by"):
        import_graph(content, tmp_path, "m")
    assert not (tmp_path / "m").exists()
    manifest, _ = verify_bundle(import_graph(content, tmp_path, "m", Options(alone=True)))
    assert (manifest.step.alone, manifest.step.bitwise) == (True, True)
    with Engine.load(tmp_path / "m") as engine:
        assert engine.bitwise


def test_bits_that_depend_on_the_batch_are_not_promised(tmp_path: Path) -> None:
    # ONNX Runtime's recurrent operators use another kernel for a few rows.
    rng = np.random.default_rng(0)
    shapes = {"W": (1, 400, 64), "R": (1, 400, 100), "B": (1, 800)}
    tensors = {name: (rng.standard_normal(shape) * 0.2).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("LSTM", ["x", "W", "R", "B", "", "h", "c"], ["all", "hn", "cn"], hidden_size=100),
        helper.make_node("Squeeze", ["all", "axes"], ["y"]),
    ]
    state: list[int | str] = [1, "batch", 100]
    content = graph(
        nodes,
        {"x": [1, "batch", 64], "h": state, "c": state},
        {"y": ["batch", 100], "hn": state, "cn": state},
        tensors | {"axes": np.array([0, 1], np.int64)},
    )
    imported = import_step(source(content), Options(), tmp_path / "m")
    manifest, proofs = verify_bundle(imported.path)
    assert [each.tensor.name for each in manifest.step.states] == ["h", "c"]
    assert manifest.step.bitwise == (not imported.proven.note) == proofs.proofs[0].bitwise
    if imported.proven.note:
        assert "none are promised; --alone keeps them" in imported.proven.note
    with Engine.load(tmp_path / "m") as engine:
        assert engine.bitwise == manifest.step.bitwise


@pytest.mark.parametrize(
    ("content", "options", "problem"),
    [
        (elman(state=("a", "b")), {}, "no state: no output is named as the next value"),
        (elman(state=("a", "b")), {"states": {"a": "c"}}, "--state: no output is named 'c'; there are y, b"),
        (
            elman(state=("a", "b")),
            {"states": {"a": "y"}},
            r"'a' float32 \[batch, 8\] and 'y' float32 \[batch, 4\] don't",
        ),
        (elman(batch=1), {}, "no dimension is open for several sequences; --alone"),
        (elman(), {"constants": {"q": "1"}}, "--set: no input is named 'q'; there are x, h"),
        (elman(), {"constants": {"x": "one"}}, "--set x=one: numbers expected"),
        (elman(), {"initial": {"h": np.zeros(3)}}, r"--initial h: \[3\], \[8\] expected"),
        (elman(), {"initial": {"h": np.full(8, np.nan)}}, "--initial h: has values that are not finite"),
        (elman(), {"contexts": {"x": 3}}, r"--context x:3: 'x' float32 \[batch, 3\] has room for 0 more"),
        (counter(), {"initial": {"count": np.array([0.5])}}, "--initial count: whole numbers expected"),
        (
            graph(
                [helper.make_node("Concat", ["h", "x"], ["h_next"], axis=1), helper.make_node("Relu", ["x"], ["y"])],
                {"x": SHAPE, "h": SHAPE},
                {"y": SHAPE, "h_next": ["batch", "grown"]},
                {},
            ),
            {},
            r"state 'h': its next value 'h_next' of 3 sequences is \[3, 6\], \[3, 3\] expected",
        ),
        (
            graph(
                [helper.make_node("Add", ["h", "x"], ["h_next"]), helper.make_node("ReduceSum", ["x"], ["y"])],
                {"x": SHAPE, "h": SHAPE},
                {"y": [1, 1], "h_next": SHAPE},
                {},
            ),
            {},
            "output 'y': .* it has no batch; --alone",
        ),
    ],
)
def test_refusals_say_what_to_do(content: bytes, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ImportRefusedError, match=problem):
        step_graph(source(content), Options(**options))


def external(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (external, "tensor 'W': its values are in another file"),
        (
            lambda model: model.graph.node[0].CopyFrom(helper.make_node("Loop", [], ["xw"], name="l")),
            "Loop 'l': a loop",
        ),
        (lambda model: setattr(model.graph.node[0], "domain", "com.x"), "MatMul 'xw': of 'com.x', only ONNX's own"),
        (lambda model: model.graph.input[0].type.Clear(), "'x': no tensor"),
        (lambda model: model.Clear(), "not an ONNX model"),
    ],
)
def test_files_that_cannot_be_trusted_are_refused(change: Callable[[onnx.ModelProto], object], problem: str) -> None:
    with pytest.raises(ImportRefusedError, match=problem):
        source(changed(elman(), change))


def test_labels_choose_the_output_that_fits_them(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["h", "x"], ["h_next"]),
        helper.make_node("ReduceSum", ["h_next", "last"], ["total"], keepdims=1),
        helper.make_node("Softmax", ["h_next"], ["scores"]),
    ]
    outputs: dict[str, Any] = {"total": ["batch", 1], "scores": SHAPE, "h_next": SHAPE}
    content = graph(nodes, {"x": SHAPE, "h": SHAPE}, outputs, {"last": np.array([1], np.int64)})
    manifest, _ = verify_bundle(import_graph(content, tmp_path, "m", labels=["a", "b", "c"]))
    assert [each.name for each in manifest.step.outputs] == ["scores", "total"]
    assert manifest.step.probabilities
    with Engine.load(tmp_path / "m") as engine:
        result = engine.classify([np.eye(3)[:1] * 5])
        assert (result.labels, set(engine.open().advance(np.eye(3)).outputs)) == (["a"], {"scores", "total"})
    with pytest.raises(ImportRefusedError, match="--labels: 4 names, and no output has as many values"):
        import_graph(content, tmp_path, "m", labels=list("abcd"))


def test_a_report_says_what_to_type() -> None:
    assert list(report(source(elman()), Path("m.onnx")))[-1].split() == (
        ["type", "unroll-export", "import", "m.onnx", "--out", "models/m"]
    )
    lines = "\n".join(report(source(elman(state=("a", "b"))), Path("m.onnx")))
    assert "'a' and output 'b' have one shape: --state a=b" in lines
    assert "type" not in lines.replace("dtype", "")
    assert "--alone" in "\n".join(report(source(elman(batch=1)), Path("m.onnx")))
