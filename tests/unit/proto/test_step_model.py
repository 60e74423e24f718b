"""Step models in a manifest: a good one passes, and each contradiction is found and named."""

from collections.abc import Callable

import numpy as np
import pytest

from unroll_proto.bundle import check_model
from unroll_proto.step_model import MAX_STATE_BYTES, initial_of, spec_of, tensor_of
from unroll_proto.v1 import bundle_pb2 as pb

Change = Callable[[pb.BundleManifest], object]


def tensor(name: str, *shape: str, dtype: str = "float32") -> pb.TensorSpec:
    return pb.TensorSpec(name=name, dtype=dtype, shape=shape)


def manifest() -> pb.BundleManifest:
    """The manifest that the import of a graph like silero's writes."""
    return pb.BundleManifest(
        architecture="step",
        input_size=512,
        output_size=3,
        class_labels=["speech", "noise"],
        step=pb.StepModel(
            source="vad.onnx",
            source_sha256="ab" * 32,
            inputs=[tensor("input", "batch", "512")],
            outputs=[tensor("output", "batch", "1"), tensor("ids", "batch", "2", dtype="int64")],
            states=[
                pb.StateSpec(tensor=tensor("state", "2", "batch", "4"), next="stateN"),
                pb.StateSpec(tensor=tensor("count", "batch", dtype="int64"), initial=np.int64(7).tobytes()),
            ],
            form="published",
            bitwise=True,
        ),
    )


def test_a_good_one_passes() -> None:
    check_model(manifest())


def test_a_tensor_is_read_as_it_was_described() -> None:
    state, count = manifest().step.states
    read = tensor_of(state.tensor)
    assert (read.before, read.after, read.size, read.nbytes, read.batch_dims(5)) == ((2,), (4,), 8, 32, (2, 5, 4))
    assert spec_of(read) == state.tensor
    assert initial_of(state, read).tolist() == [[0] * 4] * 2
    assert initial_of(count, tensor_of(count.tensor)).tolist() == 7


def state(index: int, shape: tuple[str, ...]) -> Change:
    def change(manifest: pb.BundleManifest) -> None:
        manifest.step.states[index].tensor.shape[:] = shape

    return change


def set_(path: str, value: object) -> Change:
    """Sets a field by its path, as `step.inputs.0.name`."""

    def change(manifest: pb.BundleManifest) -> None:
        *parents, last = path.split(".")
        at: object = manifest
        for part in parents:
            at = at[int(part)] if part.isdigit() else getattr(at, part)  # type: ignore[index]
        setattr(at, last, value)

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (set_("architecture", "simple_rnn"), "step given for architecture 'simple_rnn'"),
        (set_("hidden_size", 3), "hidden_size and num_layers of a step model are 0"),
        (lambda m: m.feature_names.append("x"), "feature_names of a step model are empty"),
        (set_("input_size", 511), "input_size 511, step.inputs have 512 values"),
        (set_("output_size", 4), "output_size 4, step.outputs have 3 values"),
        (set_("step.form", "guessed"), "step.form 'guessed', one of published, stepped, matmul, whole expected"),
        (set_("step.source_sha256", "AB" * 32), "step.source_sha256: 64 hexadecimal digits"),
        (lambda m: m.step.ClearField("states"), "step.states: 0 given, 1 to 1024 expected"),
        (lambda m: m.step.ClearField("outputs"), "step.outputs: 0 given"),
        (set_("step.inputs.0.name", ""), "step.inputs: a name of 0 bytes"),
        (set_("step.inputs.0.name", "state"), "two inputs and states are named 'state'"),
        (set_("step.outputs.0.name", "stateN"), "two outputs and next states are named 'stateN'"),
        (
            set_("step.inputs.0.dtype", "bool"),
            "step.inputs: 'input': dtype bool, one of float32, float64",
        ),
        (set_("step.states.0.tensor.dtype", "float16"), "step.states: 'state': dtype 'float16', one of"),
        (state(0, ("2", "4")), "step.states: 'state' has no batch, and the model isn't alone"),
        (state(0, ("batch", "batch")), "step.states: 'state': shape"),
        (state(0, ("batch", "0")), "step.states: 'state': shape"),
        (state(0, ("batch", "-1")), "step.states: 'state': shape"),
        (state(0, ("batch", "time")), "step.states: 'state': shape"),
        (state(0, ("batch", str(MAX_STATE_BYTES))), "step.states: .* bytes a sequence, 16777216 at most"),
        (set_("step.states.1.initial", b"1234"), "'count': initial has 4 bytes, 8 expected"),
        (
            set_("step.states.0.initial", np.full(8, np.nan, "<f4").tobytes()),
            "initial has values that are not finite",
        ),
        (lambda m: m.class_labels.append("third"), "class_labels: 3 for the 1 values of 'output'"),
        (lambda m: m.class_labels.__setitem__(1, "speech"), "class_labels: 2 for the 1 values of 'output', distinct"),
    ],
)
def test_a_contradiction_is_named(change: Change, problem: str) -> None:
    wrong = manifest()
    change(wrong)
    with pytest.raises(ValueError, match=problem):
        check_model(wrong)


def test_alone_no_batch_is_needed() -> None:
    alone = manifest()
    alone.step.alone = True
    state(0, ("2", "1", "4"))(alone)
    check_model(alone)


def whole() -> pb.BundleManifest:
    """Returns the manifest of a model of whole sequences."""
    made = manifest()
    made.architecture = made.step.form = "whole"
    made.step.inputs[0].shape[:] = ["time", "batch", *[each for each in made.step.inputs[0].shape if each != "batch"]]
    for each in made.step.outputs:
        each.shape[:] = [size for size in each.shape if size != "batch"]
    made.step.ClearField("states")
    return made


def test_a_model_of_whole_sequences_passes() -> None:
    check_model(whole())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (set_("architecture", "step"), "step given for architecture 'step'"),
        (lambda m: m.step.inputs[0].shape.remove("time"), "step.inputs: one that begins with the dimensions batch and"),
        (lambda m: m.step.states.add(), "step.states: given for a graph of whole sequences"),
        (lambda m: m.step.outputs[0].shape.append("time"), "step.outputs: 'output': shape"),
    ],
)
def test_a_contradiction_of_whole_sequences_is_named(change: Change, problem: str) -> None:
    wrong = whole()
    change(wrong)
    with pytest.raises(ValueError, match=problem):
        check_model(wrong)
