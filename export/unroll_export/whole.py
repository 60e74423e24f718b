"""Models of whole sequences: networks that look at more than the past, by both directions, pooling or attention."""

import copy
import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unroll_engine.models.spec import Float32Array
from unroll_engine.runtimes.whole import WholeRuntime
from unroll_export.parity.runners import ParityError
from unroll_export.steps.eager_module import EagerModule
from unroll_export.steps.folding import one_line
from unroll_export.steps.importing import Imported, write_bundle
from unroll_export.steps.parts import tensors_of
from unroll_export.steps.plan import constant_of
from unroll_export.steps.proof import OnCase, Proven, are_probabilities, example
from unroll_export.steps.reading import Source, source_of
from unroll_export.steps.sequence_graph import PREFIX_BOUND, Original, SequenceGraph
from unroll_export.steps.sequences import recurrent_nodes, with_constants
from unroll_export.steps.step_module import OPSET
from unroll_export.weight_files import ImportRefusedError
from unroll_proto import bundle
from unroll_proto.step_model import BATCH, OUTPUT_DTYPES, TIME, WHOLE, tensor_of
from unroll_proto.v1 import bundle_pb2 as pb

_LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 7, 30, 4)
"""Timesteps of the sequences that must have the same bits in every run."""


def import_whole(
    source: Source,
    out: Path,
    labels: Sequence[str] = (),
    on_case: OnCase = lambda _: None,
    constants: Mapping[str, str] | None = None,
    originals: Mapping[str, Original] | None = None,
) -> Imported:
    """Writes a graph of whole sequences as the next version of the model folder `out`, as it is.

    Args:
        source: The graph, with an input [batch, time, *shape] or [time, batch, *shape].
        out: The model folder; created if missing.
        labels: Class names of the values of the first output; empty without classes.
        on_case: Called with each case of the proof before it is run.
        constants: Inputs with fixed values, by name.
        originals: What the graph must compute, by the names of the cases of the proof; the file itself if absent.

    Raises:
        ImportRefusedError: the graph can't be served so.
        ParityError: it computes something else. Nothing is left behind.
        BundleError: `out` can't be a model folder.
        OSError: `out` can't be written to.
    """
    given = constants or {}
    fixed = {each.name: constant_of(each, given[each.name]) for each in source.inputs if each.name in given}
    source = with_constants(source, fixed)
    nodes = recurrent_nodes(source.model)
    if not nodes:
        raise ImportRefusedError(f"{source.file}: no RNN, GRU or LSTM node")
    graph = SequenceGraph(source, [nodes[0].input[0]])
    graph.measure(nodes[0].input[0])
    if graph.steps:
        raise ImportRefusedError(f"{graph.value}: time is fixed at {graph.steps}; export the model with a dynamic time")
    model = source.model
    outputs = _outputs(graph, len(labels))
    for value in [each for each in model.graph.output if each.name not in {output.name for output in outputs}]:
        model.graph.output.remove(value)
    content = model.SerializeToString(deterministic=True)
    layout = [BATCH, TIME] if graph.batch_first else [TIME, BATCH]
    step = pb.StepModel(
        source=source.file,
        source_sha256=source.sha256,
        inputs=[
            pb.TensorSpec(name=graph.value.name, dtype=graph.value.dtype.name, shape=[*layout, *map(str, graph.shape)])
        ],
        outputs=outputs,
        constants={name: ",".join(map(str, value.reshape(-1).tolist())) for name, value in fixed.items()},
        form=WHOLE,
    )
    runtime = WholeRuntime(content, step)
    known = originals or {f"{source.file}, without optimizations": graph}
    return write_bundle(out, content, step, labels, lambda: _prove(content, runtime, step, known, on_case))


def export_whole(
    original: EagerModule,
    out: Path,
    labels: Sequence[str] = (),
    on_case: OnCase = lambda _: None,
    weights: tuple[str, str] | None = None,
) -> Imported:
    """Exports a module as a graph of whole sequences, proven against eager PyTorch in float32 and float64.

    Args:
        original: The module.
        out: See import_whole.
        labels: See import_whole.
        on_case: See import_whole.
        weights: Name and SHA-256, hexadecimal, of the file that the module was rebuilt from; None if there is none.

    Raises:
        ImportRefusedError: torch can't export it.
        ParityError, BundleError, OSError: see import_whole.
    """
    names = [name for name, axis in original.time_axes.items() if axis is None] or list(original.time_axes)
    axis = 1 if original.batch_first else 0
    drawn = torch.from_numpy(original.draw(np.random.default_rng(0), *((1, 7) if original.batch_first else (7, 1))))
    inputs = drawn if original.example.is_floating_point() else drawn.to(original.example.dtype)
    file = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Outputs(original.module, names).float(),
                (inputs,),
                file,  # type: ignore[arg-type]  # paths alone are declared, for the other exporter
                dynamo=False,
                input_names=["values"],
                output_names=names,
                dynamic_axes={"values": {axis: TIME}},
                opset_version=OPSET,
            )
    except Exception as error:
        raise ImportRefusedError(f"torch can't export the module for whole sequences: {one_line(error)}") from error
    source = source_of(type(original.module).__name__, file.getvalue())
    if weights:
        source = replace(source, file=weights[0], sha256=weights[1])
    originals = {"eager PyTorch": original, "eager PyTorch in float64": original.in_float64()}
    return import_whole(source, out, labels, on_case, originals=originals)


def verify_whole(path: Path, manifest: pb.BundleManifest, on_case: OnCase = lambda _: None) -> Proven:
    """Repeats, on this machine, the proof that a sequence has the same bits in every run.

    Raises:
        ParityError: it has not.
    """
    content = bundle.read_artifact(path, bundle.artifact_of(manifest, pb.ARTIFACT_KIND_ONNX_STEP))
    return _prove(content, WholeRuntime(content, manifest.step), manifest.step, {}, on_case)


class _Outputs(nn.Module):
    """A copy of a module that returns some of its outputs.

    Args:
        module: The module.
        names: Names of the outputs; see parts.tensors_of.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module = copy.deepcopy(module)
        self._names = names

    def forward(self, values: Tensor) -> tuple[Tensor, ...]:
        """Returns the outputs in the order of the names."""
        found = tensors_of(self.module(values))
        return tuple(found[name] for name in self._names)


def _outputs(graph: SequenceGraph, classes: int) -> list[pb.TensorSpec]:
    """Describes the outputs that have a value for a sequence; the one with as many values as classes comes first."""
    names = [name for name in graph.outputs if graph.time_axes[name] is None]
    if not names:
        raise ImportRefusedError(
            f"output {graph.outputs[0]!r}: has a value for each step; a model of whole sequences needs one for a "
            "sequence, such as of the last step or of a pooling over time"
        )
    sizes = (1, 7) if graph.batch_first else (7, 1)
    arrays = graph.run(names, graph.draw(np.random.default_rng(0), *sizes))
    specs = []
    for name, array in zip(names, arrays, strict=True):
        if array.dtype.name not in OUTPUT_DTYPES:
            raise ImportRefusedError(f"output {name!r}: {array.dtype}, one of {', '.join(OUTPUT_DTYPES)} expected")
        dims = list(array.shape)
        if 1 in dims:
            dims.remove(1)
        specs.append(pb.TensorSpec(name=name, dtype=array.dtype.name, shape=map(str, dims)))
    if classes:
        first = next((spec for spec in specs if max(tensor_of(spec).size, 2) == classes), None)
        if first is None:
            sizes_text = ", ".join(f"{spec.name!r} has {tensor_of(spec).size}" for spec in specs)
            raise ImportRefusedError(f"--labels: {classes} names, and no output has as many values: {sizes_text}")
        specs = [first, *(spec for spec in specs if spec is not first)]
    return specs


def _prove(
    content: bytes,
    runtime: WholeRuntime,
    step: pb.StepModel,
    originals: Mapping[str, Original],
    on_case: OnCase,
) -> Proven:
    """Compares the graph, as served, with what it must compute, on sequences of every length; and its bits."""
    proof = pb.ArtifactProof(
        kind=pb.ARTIFACT_KIND_ONNX_STEP,
        file=bundle.ONNX_RNN,
        sha256=hashlib.sha256(content).hexdigest(),
        runtime="onnx",
    )
    for name, original in originals.items():
        on_case(name)
        time, worst = _difference(runtime, original, [each.name for each in step.outputs])
        proof.cases.add(
            name=name, batch=1, time=time, max_abs_diff=worst, worst_ratio=worst / PREFIX_BOUND, bound=PREFIX_BOUND
        )
    name = "each sequence again, after others"
    on_case(name)
    values = example(step, max(_LENGTHS), len(_LENGTHS))
    sequences = [values[:length, lane] for lane, length in enumerate(_LENGTHS)]
    known = [runtime.run_one(each) for each in sequences]
    again = [runtime.run_one(each) for each in reversed(sequences)][::-1]
    pairs = zip(known, again, strict=True)
    differences = sum(int((one.view(np.uint32) != other.view(np.uint32)).sum()) for one, other in pairs)
    worst = max(float(np.abs(one - other).max()) for one, other in zip(known, again, strict=True))
    if not worst <= PREFIX_BOUND:
        raise ParityError(f"a sequence gives other results when it is run again (off by {worst:.2g})")
    proof.cases.add(
        name=name,
        batch=len(sequences),
        time=max(_LENGTHS),
        max_abs_diff=worst,
        bit_differences=differences,
        worst_ratio=worst / PREFIX_BOUND,
        bound=PREFIX_BOUND,
    )
    proof.bitwise = not differences
    proof.max_abs_diff = max(case.max_abs_diff for case in proof.cases)
    proof.worst_ratio = max(case.worst_ratio for case in proof.cases)
    scores = np.stack(known)[:, : tensor_of(step.outputs[0]).size]
    note = "" if proof.bitwise else "the bits of a sequence differ between runs, so none are promised"
    return Proven(proof, proof.bitwise, note, are_probabilities(scores))


def _difference(runtime: WholeRuntime, original: Original, names: list[str]) -> tuple[int, float]:
    """Returns the longest sequence compared, and the largest difference, relative to outputs above 1."""
    longest, worst = 0, 0.0
    for values in original.probes():
        longest = max(longest, len(values))
        for end in range(1, len(values) + 1):
            found = runtime.run_one(np.ascontiguousarray(values[:end].reshape(end, -1)))
            ends = original.ends(values[:end])
            expected = np.concatenate([ends[name].astype(np.float64).reshape(-1) for name in names])
            difference = _relative(found, expected)
            if not difference <= PREFIX_BOUND:
                raise ParityError(
                    f"the graph doesn't compute what the original does for {end} steps (off by {difference:.2g})"
                )
            worst = max(worst, difference)
    return longest, worst


def _relative(found: Float32Array, expected: NDArray[np.float64]) -> float:
    return float((np.abs(found - expected) / np.maximum(np.abs(expected), 1)).max(initial=0.0))
