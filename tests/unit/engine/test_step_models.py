"""Step models in process: outputs by name, states of any dtype and layout, snapshots, classes, bits."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from support import bundles
from support.models import alone
from support.step_graphs import I64, changed, elman, graph, import_examples, import_graph

from unroll_engine import BundleError, Engine, InvalidRequestError, Snapshot
from unroll_engine.bundle import verify_folder
from unroll_engine.core import EngineCore, deliver
from unroll_engine.jobs import StepsJob
from unroll_engine.models.loader import Loader
from unroll_engine.observer import NoMetrics
from unroll_export.steps.plan import Options


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of step models."""
    root = tmp_path_factory.mktemp("step-models")
    import_examples(root)
    return root


@pytest.fixture(scope="module")
def engine(root: Path) -> Engine:
    """A step model without classes."""
    return Engine.load(root / "elman")


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), cut=st.integers(0, 39))
def test_a_sequence_has_the_same_bits_beside_others_cut_and_resumed(
    engine: Engine, lengths: list[int], cut: int
) -> None:
    rng = np.random.default_rng(len(lengths))
    for steps in lengths:
        values = rng.standard_normal((steps, 3)).astype(np.float32)
        whole = engine.open().advance(values)
        assert whole.outputs["y"].tobytes() == whole.logits.tobytes()
        assert (whole.outputs["y"].shape, whole.states.shape) == ((steps, 4), (steps, 0))
        begin = min(cut, steps - 1)
        sequence = engine.open()
        if begin:
            sequence.advance(values[:begin])
        resumed = engine.open(Snapshot.from_bytes(sequence.snapshot().to_bytes()))
        assert resumed.advance(values[begin:]).logits.tobytes() == whole.logits[begin:].tobytes()
        assert resumed.step == steps


def test_without_labels_there_are_no_classes(engine: Engine) -> None:
    assert engine.bitwise
    with pytest.raises(InvalidRequestError, match=r"elman/1 has no class labels"):
        engine.classify([np.zeros((2, 3))])


def test_probabilities_are_taken_as_they_are(root: Path) -> None:
    with Engine.load(root / "classes") as engine:
        sequences = [np.random.default_rng(steps).standard_normal((steps, 3)) for steps in (1, 7, 30)]
        result = engine.classify(sequences, return_final_states=True)
        for index, values in enumerate(sequences):
            last = engine.open().advance(values).outputs["y"][-1]
            assert result.probabilities[index].tobytes() == last.tobytes()
            assert result.labels[index] == "abcd"[int(last.argmax())]
        assert result.final_states is not None
        again = engine.classify(sequences, initial_states=result.final_states)
        for index, values in enumerate(sequences):
            assert again.logits[index].tobytes() == engine.open().advance(np.tile(values, (2, 1))).logits[-1].tobytes()


def test_a_state_of_whole_numbers_is_kept(root: Path) -> None:
    with Engine.load(root / "counter") as engine:
        sequence = engine.open()
        assert sequence.advance(np.zeros((3, 1))).outputs["y"].ravel().tolist() == [0, 1, 2]
        snapshot = sequence.snapshot()
        assert snapshot.data == (np.int64(3).tobytes(),)
        assert engine.open(snapshot).advance(np.full((2, 1), 0.5)).outputs["y"].ravel().tolist() == [3.5, 4.5]
        wrong = snapshot.to_proto()
        wrong.state[0] = b"\0" * 4
        with pytest.raises(InvalidRequestError, match=r"4 bytes, 8 expected: int64 \[1, 1\]"):
            engine.open(Snapshot.from_proto(wrong))


def test_an_initial_state_is_the_beginning_of_every_sequence(tmp_path: Path) -> None:
    initial = np.linspace(-1, 1, 8, dtype=np.float32)
    import_graph(elman(), tmp_path, "zeros")
    import_graph(elman(), tmp_path, "begun", Options(initial={"h": initial}))
    values = np.random.default_rng(0).standard_normal((5, 3))
    with Engine.load(tmp_path / "begun") as begun, Engine.load(tmp_path / "zeros") as zeros:
        first = begun.open().snapshot()
        assert first.data == (initial.tobytes(),)
        of_zeros = zeros.open().snapshot().to_proto()
        of_zeros.state[0] = initial.tobytes()
        expected = zeros.open(Snapshot.from_proto(of_zeros)).advance(values).logits
        assert begun.open().advance(values).logits.tobytes() == expected.tobytes()
        assert begun.open(first).advance(values).logits.tobytes() == expected.tobytes()


def test_values_that_overflow_in_the_state_are_refused(root: Path, tmp_path: Path) -> None:
    nodes = [helper.make_node("Exp", ["x"], ["s_next"]), helper.make_node("Add", ["s", "x"], ["y"])]
    content = graph(nodes, {"x": ["batch", 1], "s": ["batch", 1]}, {"y": ["batch", 1], "s_next": ["batch", 1]}, {})
    import_graph(content, tmp_path, "exp")
    with Engine.load(tmp_path / "exp") as engine:
        sequence = engine.open()
        sequence.advance([[1.0]])
        before = sequence.snapshot().data
        with pytest.raises(InvalidRequestError, match="can't compute values"):
            sequence.advance([[1000.0]])
        assert (sequence.step, sequence.snapshot().data) == (1, before)


def test_an_index_out_of_range_harms_no_other_sequence(tmp_path: Path) -> None:
    nodes = [helper.make_node("Gather", ["table", "id"], ["row"]), helper.make_node("Add", ["s", "row"], ["y"])]
    nodes.append(helper.make_node("Identity", ["y"], ["s_next"]))
    shape = ["batch", 1]
    table = {"table": np.array([[0.5], [2.0]], np.float32)}
    content = graph(nodes, {"id": ["batch"], "s": shape}, {"y": shape, "s_next": shape}, table, {"id": I64})
    import_graph(content, tmp_path, "ids")
    with Engine.load(tmp_path / "ids") as engine, pytest.raises(InvalidRequestError, match="or not an index"):
        engine.open().advance([[7.0]])
    model = Loader("auto", "cpu", 4).load(verify_folder(tmp_path / "ids" / "1"))
    ids = np.array([[[1], [7], [0]], [[1], [0], [0]]], np.float32)
    result = model.runtime.run(ids, model.spec.initial_state(3))
    assert result.logits[:, [0, 2], 0].tolist() == [[2, 0.5], [4, 1]]
    assert np.isnan(result.logits[:, 1]).all()
    assert np.ravel(result.final_state[0]).tolist() == [4, 0, 1]


def test_another_runtime_is_refused(root: Path) -> None:
    bundle = verify_folder(root / "elman" / "1")
    with pytest.raises(BundleError, match="a step model is run by onnx on cpu"):
        Loader("torchscript", "cpu", 4).load(bundle)


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40), lanes=st.integers(1, 9), seed=st.integers(0, 99))
def test_chunks_of_many_sequences_in_one_job_have_the_bits_of_each(
    root: Path, lengths: list[int], lanes: int, seed: int
) -> None:
    model = Loader("auto", "cpu", lanes).load(verify_folder(root / "elman" / "1"))
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((sum(lengths), 3), np.float32)
    offsets = np.array([0, *np.cumsum(lengths)])
    initial = (rng.standard_normal((1, len(lengths), 8)).astype(np.float32),)
    job = StepsJob(model, values, offsets, initial, keeps_states=True)
    core = EngineCore([model], lanes, 7, NoMetrics())
    core.add(job, 0.0)
    while not job.over:
        assert core.prepare(0.0) is not None
        core.run()
        deliver(core.events())
    assert job.final_state is not None
    for index, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        logits, _, final = alone(model, values[begin:end], tuple(array[:, index] for array in initial))
        assert job.logits[begin:end].tobytes() == logits.tobytes()
        assert job.final_state[0][:, index].tobytes() == final[0].tobytes()
    assert not job.lost


def described(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Spoils the description of a step model in a manifest."""
    return lambda path: bundles.edit(path / "manifest.json", lambda manifest: change(manifest["step"]))


def replaced(content: bytes) -> Callable[[Path], None]:
    """Puts another graph into a bundle, with checksums that fit."""

    def change(path: Path) -> None:
        (path / "model.onnx").write_bytes(content)
        bundles.vouch(path, "model.onnx", proven=True)

    return change


def greedy() -> bytes:
    """A graph that asks for 64 GB in every run."""
    nodes = [
        helper.make_node("ConstantOfShape", ["huge"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["zero"], keepdims=0),
        helper.make_node("Add", ["x", "zero"], ["y"]),
        helper.make_node("Identity", ["h"], ["h_next"]),
    ]
    shape = ["batch", 3]
    tensors = {"huge": np.array([2**34], np.int64)}
    return graph(nodes, {"x": shape, "h": ["batch", 8]}, {"y": shape, "h_next": ["batch", 8]}, tensors)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (described(lambda step: step.update(bitwise=False)), "step.bitwise is False, the proof says not"),
        (described(lambda step: step["states"][0]["tensor"].update(name="g")), r"it takes \['h', 'x'\], the manifest"),
        (described(lambda step: step["states"][0].update(next="y2")), "does not run: .*Invalid output name:y2"),
        (described(lambda step: step["outputs"][0].update(dtype="int64")), "'y' gives float32 .*, int64 .* expected"),
        (replaced(elman(hidden=9)), "does not run"),
        (replaced(b"no model"), "model.onnx: not an ONNX model"),
        (replaced(changed(elman(), lambda m: m.graph.node[0].__setattr__("op_type", "Loop"))), "Loop 'xw': a loop"),
        (replaced(greedy()), "does not run: .*ConstantOfShape"),
    ],
)
def test_a_spoiled_bundle_is_refused_and_says_why(
    root: Path, tmp_path: Path, spoil: Callable[[Path], None], problem: str
) -> None:
    path = Path(shutil.copytree(root / "elman" / "1", tmp_path / "1"))
    spoil(path)
    with pytest.raises(BundleError, match=problem):
        Engine.load(path)
