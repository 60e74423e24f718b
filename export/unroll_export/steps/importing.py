"""Imports an ONNX file as a bundle version of a step model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from unroll_engine.arrays import to_bytes
from unroll_engine.runtimes.step import StepRuntime
from unroll_export.bundle_writer import Draft
from unroll_export.publishing import library_versions, model_name, now, publish
from unroll_export.steps.folding import fold, measure_outputs
from unroll_export.steps.matmul import to_matmul
from unroll_export.steps.plan import Options, Plan, constant_of, make_plan
from unroll_export.steps.proof import STEPS, OnCase, Proven, own_steps, prove, prove_close, source_steps
from unroll_export.steps.reading import Source
from unroll_export.steps.sequence_graph import PREFIX_BOUND, prove_prefixes
from unroll_export.steps.sequences import Stepped, is_sequence_graph, to_steps
from unroll_export.weight_files import ImportRefusedError
from unroll_proto import bundle, step_model
from unroll_proto.step_model import spec_of
from unroll_proto.v1 import bundle_pb2 as pb


class StepGraph(NamedTuple):
    """A step graph and its description for the manifest.

    Attributes:
        content: The graph, serialized ONNX.
        step: Its description; `bitwise` is not known before the proof.
        plan: The meaning of its inputs and outputs.
        stepped: The graph of sequences that it was made of; None if the source is a graph of one timestep.
    """

    content: bytes
    step: pb.StepModel
    plan: Plan
    stepped: Stepped | None


class Imported(NamedTuple):
    """A bundle version that was written.

    Attributes:
        path: Its folder.
        step: The description of its graph.
        proven: Its proof.
    """

    path: Path
    step: pb.StepModel
    proven: Proven


def step_graph(source: Source, options: Options, classes: int = 0, stepped: Stepped | None = None) -> StepGraph:
    """Makes the step graph of a source.

    Args:
        source: The ONNX file.
        options: Options of the caller.
        classes: Number of classes, 0 for none; the output that fits them comes first.
        stepped: The steps of a network of sequences, with the source; None if the source shows them.

    Raises:
        ImportRefusedError: the source can't be a step graph, or an option does not fit it.
    """
    constants = {
        value.name: constant_of(value, options.constants[value.name])
        for value in source.inputs
        if value.name in options.constants
    }
    if stepped is None and not options.states and is_sequence_graph(source):
        stepped = to_steps(source, constants)
    if stepped:
        options = replace(
            options,
            states={name: f"{name}_next" for name in stepped.states},
            constants={},
            initial={**stepped.initial, **options.initial},
        )
        source = stepped.source
    plan = make_plan(source, options)
    model = fold(source, plan)
    if options.matmul:
        model = to_matmul(model, plan)
    content = model.SerializeToString(deterministic=True)
    outputs = measure_outputs(content, plan)
    if classes:
        fitting = [tensor for tensor in outputs if max(tensor.size, 2) == classes]
        if not fitting:
            sizes = ", ".join(f"{tensor.name!r} has {tensor.size}" for tensor in outputs)
            raise ImportRefusedError(f"--labels: {classes} names, and no output has as many values: {sizes}")
        outputs = (fitting[0], *(tensor for tensor in outputs if tensor is not fitting[0]))
        plan = replace(plan, outputs=tuple(tensor.name for tensor in outputs))
    states = []
    for state in plan.states:
        initial = b"" if state.initial is None else to_bytes(state.initial)
        states.append(pb.StateSpec(tensor=spec_of(state.tensor), next=state.next, initial=initial))
    step = pb.StepModel(
        source=source.file,
        source_sha256=source.sha256,
        inputs=[spec_of(tensor) for tensor in plan.inputs],
        outputs=[spec_of(tensor) for tensor in outputs],
        states=states,
        constants={name: ",".join(map(str, value.reshape(-1).tolist())) for name, value in constants.items()},
        form="matmul" if options.matmul else "stepped" if stepped else "published",
        alone=plan.alone,
    )
    return StepGraph(content, step, plan, stepped)


def import_step(
    source: Source,
    options: Options,
    out: Path,
    labels: Sequence[str] = (),
    on_case: OnCase = lambda _: None,
    stepped: Stepped | None = None,
) -> Imported:
    """Writes a source as the next version of the model folder `out`, whose name is the model's.

    Args:
        source: The ONNX file.
        options: Options of the caller.
        out: The model folder; created if missing.
        labels: Class names of the values of the first output; empty without classes.
        on_case: Called with each case of the proof before it is run.
        stepped: See step_graph.

    Raises:
        ImportRefusedError: the source is not a step graph, or can't be served.
        ParityError: its step graph computes other results. Nothing is left behind.
        BundleError: `out` can't be a model folder.
        OSError: `out` can't be written to.
    """
    model_name(out)
    graph = step_graph(source, options, len(labels), stepped)
    return write_bundle(out, graph.content, graph.step, labels, lambda: _prove(source, graph, on_case))


def write_bundle(
    out: Path, content: bytes, step: pb.StepModel, labels: Sequence[str], prove: Callable[[], Proven]
) -> Imported:
    """Proves an imported graph, and writes it as the next version of the model folder `out`.

    Args:
        out: The model folder; created if missing.
        content: The graph.
        step: Its description, without the results of the proof.
        labels: Class names of the values of the first output; empty without classes.
        prove: Proves the graph.

    Raises:
        ImportRefusedError: the graph is over a limit of the format.
        ParityError, BundleError, OSError: see import_step.
    """
    name = model_name(out)
    manifest = pb.BundleManifest(
        format=bundle.FORMAT,
        name=name,
        architecture=step_model.WHOLE if step.form == step_model.WHOLE else step_model.ARCHITECTURE,
        input_size=sum(tensor.size for tensor in map(step_model.tensor_of, step.inputs)),
        output_size=sum(tensor.size for tensor in map(step_model.tensor_of, step.outputs)),
        class_labels=labels,
        step=step,
        artifacts=[
            pb.Artifact(
                kind=pb.ARTIFACT_KIND_ONNX_STEP,
                file=bundle.ONNX_RNN,
                inputs=[*step.inputs, *(state.tensor for state in step.states)],
                outputs=step.outputs,
            ),
            pb.Artifact(kind=pb.ARTIFACT_KIND_PARITY, file=bundle.PARITY),
        ],
        created=now(),
        libraries=library_versions(),
    )
    try:
        bundle.check_model(manifest)
    except ValueError as error:
        raise ImportRefusedError(f"{step.source}: {error}") from None
    proven = prove()
    manifest.step.bitwise = proven.bitwise
    manifest.step.probabilities = bool(labels) and proven.probabilities
    with Draft(out) as draft:
        draft.write(bundle.ONNX_RNN, content)
        path = publish(draft, manifest, [proven.proof], {})
    return Imported(path, manifest.step, proven)


def _prove(source: Source, graph: StepGraph, on_case: OnCase) -> Proven:
    """Proves the graph of a step against its source: that of one timestep, or of whole sequences."""
    content, step, plan, stepped = graph
    if step.form == "published":
        return prove(content, step, source_steps(source, plan), on_case)
    own = own_steps(StepRuntime(content, step), step)
    if stepped:
        name, length = f"{step.source}, on every prefix of a sequence", stepped.original.length
        on_case(name)
        worst = prove_prefixes(stepped.original, lambda values: own(values)[0], [each.name for each in step.outputs])
    else:
        name, length = "the file, step by step", STEPS
        on_case(name)
        worst = prove_close(step, own, source_steps(source, plan), PREFIX_BOUND)
    proven = prove(content, step, own, on_case)
    proven.proof.cases.add(
        name=name,
        batch=1,
        time=length,
        max_abs_diff=worst,
        worst_ratio=worst / PREFIX_BOUND,
        bound=PREFIX_BOUND,
    )
    proven.proof.max_abs_diff = max(proven.proof.max_abs_diff, worst)
    proven.proof.worst_ratio = max(proven.proof.worst_ratio, worst / PREFIX_BOUND)
    return proven


def verify_step(path: Path, manifest: pb.BundleManifest, on_case: OnCase = lambda _: None) -> Proven:
    """Repeats, on this machine, the proof that sequences of a step model have the same bits in any batch.

    Raises:
        ParityError: they depend on each other.
    """
    content = bundle.read_artifact(path, bundle.artifact_of(manifest, pb.ARTIFACT_KIND_ONNX_STEP))
    reference = own_steps(StepRuntime(content, manifest.step), manifest.step)
    return prove(content, manifest.step, reference, on_case)
