"""Reports the content of an ONNX file, and the command that imports it."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from unroll_export.steps.folding import fold, measure_outputs
from unroll_export.steps.pairing import Pair, compatible, find_pairs
from unroll_export.steps.plan import Options, make_plan
from unroll_export.steps.reading import Source, Value, graphs_of
from unroll_export.steps.sequences import is_bidirectional, is_sequence_graph, to_steps
from unroll_export.weight_files import ImportRefusedError


def report(source: Source, path: Path) -> Iterator[str]:
    """Yields the lines of a report on a file: inputs, outputs, state, required options, and the command to type."""
    model = source.model
    nodes = sum(len(graph.node) for graph in graphs_of(model.graph))
    opset = model.opset_import[0].version
    yield f"{path}: {len(source.content):,} bytes, sha256 {source.sha256[:16]}..., operator set {opset}, {nodes} nodes"
    pairs = find_pairs(source.inputs, source.outputs)
    for what, values in (("input", source.inputs), ("output", source.outputs)):
        for value in values:
            yield f"  {what:6}  {value}"
    if is_sequence_graph(source):
        yield from _sequences(source, path)
        return
    for pair in pairs:
        yield f"  state   {pair.before.name!r} becomes {pair.after.name!r}, {pair.reason}"
    asked, flags = _asked(source, pairs)
    for line in asked:
        yield f"  say     {line}"
    if not flags:
        problem = _problem(source)
        if problem:
            yield f"  refused {problem}"
            return
    elif not pairs:
        return
    yield f"  type    {_command(path, flags)}"


def _sequences(source: Source, path: Path) -> Iterator[str]:
    """The lines on a graph of whole sequences."""
    flags = []
    for value in source.inputs:
        if value.dims == ():
            yield f"  say     {value.name!r} is one number: --set {value.name}=VALUE"
            flags += ["--set", f"{value.name}=VALUE"]
    if is_bidirectional(source):
        yield "  made    a model of whole sequences, as it is bidirectional: it is classified, not streamed"
        yield f"  type    {_command(path, flags)}"
        return
    try:
        stepped = None if flags else to_steps(source, {})
    except ImportRefusedError as error:
        yield f"  refused {error}"
        return
    for name in stepped.states if stepped else ():
        yield f"  state   {name!r}, what begins and ends a recurrent node"
    yield "  made    a graph of one timestep; the import proves it against this file on every prefix of a sequence"
    yield f"  type    {_command(path, flags)}"


def _command(path: Path, flags: list[str]) -> str:
    return shlex.join(["unroll-export", "import", str(path), *flags, "--out", f"models/{path.stem}"])


def _asked(source: Source, pairs: list[Pair]) -> tuple[list[str], list[str]]:
    """Returns the required options and their flags."""
    lines, flags = [], []
    before = {pair.before.name for pair in pairs}
    after = {pair.after.name for pair in pairs}
    inputs = [value for value in source.inputs if value.name not in before]
    outputs = [value for value in source.outputs if value.name not in after]
    for value in inputs:
        alike = [other.name for other in outputs if _same_shape(value, other)]
        if alike:
            lines.append(
                f"{value.name!r} and output {alike[0]!r} have one shape: --state {value.name}={alike[0]} if that is "
                "its next value, nothing if they are a step's input and output"
            )
    if not pairs:
        lines.append("no output is named as the next value of an input: --state INPUT=OUTPUT for each state")
    for value in inputs:
        if value.dims == ():
            lines.append(f"{value.name!r} is one number: --set {value.name}=VALUE")
            flags += ["--set", f"{value.name}=VALUE"]
    values = [value for value in inputs if value.dims]
    still_open = [value for value in values if value.dims and len([d for d in value.dims if isinstance(d, str)]) > 1]
    if still_open and len(still_open[0].dims or ()) < 3:
        lines.append(
            f"{still_open[0].name!r} has an open dimension beside the batch: --chunk N, the values of a step; and "
            f"--context {still_open[0].name}:K if the graph also wants the last K values of the step before"
        )
        flags += ["--chunk", "N"]
    closed = [value for value in (*values, *(pair.before for pair in pairs)) if value.dims and not _is_open(value)]
    if closed:
        lines.append(f"{closed[0].name!r} has no open dimension for several sequences: --alone runs one at a time")
        flags.append("--alone")
    return lines, flags


def _problem(source: Source) -> str:
    """Returns why the file can't be imported without options; empty if it can."""
    try:
        plan = make_plan(source, Options())
        measure_outputs(fold(source, plan).SerializeToString(), plan)
    except ImportRefusedError as error:
        return str(error)
    return ""


def _same_shape(one: Value, other: Value) -> bool:
    return bool(one.dims) and len(one.dims or ()) > 1 and one.dims == other.dims and compatible(one, other)


def _is_open(value: Value) -> bool:
    return any(isinstance(dim, str) for dim in value.dims or ())
