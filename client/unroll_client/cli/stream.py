"""`unroll stream`: the hidden state of one sequence after each timestep, as it is computed."""

import asyncio
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from shutil import get_terminal_size

import click
import numpy as np

from unroll_client._types import ModelInfo, Steps
from unroll_client.cli.options import Server, one_line_errors, server_options
from unroll_client.cli.outputs import to_json
from unroll_client.cli.report import printable
from unroll_proto.cli import InputError
from unroll_proto.sequences import Sequence, SequenceError, read_sequences

Show = Callable[[Steps], None]


@click.command("stream", short_help="Shows one sequence's hidden state after each timestep.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", default="", metavar="NAME", help="Model to ask; not needed if only one is served.")
@click.option("--model-version", type=click.IntRange(min=1), metavar="N", help="Model version.  [default: the newest]")
@click.option(
    "--index", type=click.IntRange(min=0), default=0, show_default=True, help="Number of the sequence in FILE, from 0."
)
@click.option("--chunk", type=click.IntRange(min=1), default=1, show_default=True, help="Timesteps to send at a time.")
@click.option(
    "--every", type=click.IntRange(1, 2**32 - 1), default=1, show_default=True, help="Show only every n-th step."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "jsonl"]),
    default="table",
    show_default=True,
    help="Lines for people, or JSON Lines with the whole state and the logits.",
)
@server_options
def stream_command(
    file: Path,
    model: str,
    model_version: int | None,
    index: int,
    chunk: int,
    every: int,
    form: str,
    **options: object,
) -> None:
    """Streams one sequence of FILE to the server and shows its hidden state after each step, as it comes.

    The table shows, for each step, the class that is most probable so far, its probability, the length of the state
    vector, and the first of its components.
    """
    server = Server(**options)  # type: ignore[arg-type] # click has checked the types
    with one_line_errors(server):
        sequence = _sequence(file, index)
        summary = asyncio.run(_stream(server, file, sequence, model, model_version or 0, chunk, every, form))
    click.echo(summary, err=True)


def _sequence(file: Path, index: int) -> Sequence:
    found = None
    count = 0
    for count, sequence in enumerate(islice(read_sequences(file), index + 1), 1):  # noqa: B007 (used after the loop)
        found = sequence
    if found is None or count <= index:
        raise InputError(f"--index: {index}, but {file} has {count} sequences")
    return found


async def _stream(
    server: Server,
    file: Path,
    sequence: Sequence,
    name: str,
    version: int,
    chunk: int,
    every: int,
    form: str,
) -> str:
    async with server.client() as client:
        model = await client.model(name, version)
        if sequence.values.shape[1] != model.input_size:
            what = f"{sequence.values.shape[1]} features, model {model.name} has {model.input_size}"
            raise SequenceError(file, what, row=sequence.row, column="sequence")
        table = _table if model.hidden_size else _output_table
        show = _json_lines if form == "jsonl" else table(model)
        async with client.unroll(model.name, version=model.version, logits=True, every=every) as stream:
            for start in range(0, len(sequence.values), chunk):
                async for steps in stream.stream(sequence.values[start : start + chunk]):
                    show(steps)
        truth = "" if sequence.label is None else f", label in the file: {printable(sequence.label)}"
        return f"sequence {printable(sequence.id)}: {stream.step} steps by {model.name} version {model.version}{truth}"


def _json_lines(steps: Steps) -> None:
    assert steps.states is not None
    assert steps.logits is not None
    outputs = {name: array.tolist() for name, array in steps.outputs.items()}
    for index, (step, state) in enumerate(zip(steps.steps.tolist(), steps.states.tolist(), strict=True)):
        # A step model has outputs, whatever their names, and no hidden state.
        own = {"state": state} if state else {}
        click.echo(to_json({"step": step, **own, **{name: values[index] for name, values in outputs.items()}}))


def _output_table(model: ModelInfo) -> Show:
    """Shows the outputs of a step model by name, the first values of each."""
    names = [printable(tensor.name) for tensor in model.outputs]
    shown = max(1, (get_terminal_size().columns - 8 - sum(map(len, names))) // (8 * len(names)) - 1)

    def show(steps: Steps) -> None:
        arrays = [array.reshape(len(steps), -1) for array in steps.outputs.values()]
        for index, step in enumerate(steps.steps.tolist()):
            parts = []
            for name, array in zip(names, arrays, strict=True):
                values = " ".join(f"{value:.4g}" for value in array[index, :shown])
                parts.append(f"{name} {values}{' ...' if array.shape[1] > shown else ''}")
            click.echo(f"{step:>6}  {'  '.join(parts)}")

    return show


def _table(model: ModelInfo) -> Show:
    labels = [printable(label) for label in model.class_labels]
    width = max(map(len, ["label", *labels]))
    shown = min(model.hidden_size, max(1, (get_terminal_size().columns - width - 28) // 7))
    more = " ..." if shown < model.hidden_size else ""
    click.echo(f"{'step':>6}  {'label':<{width}}  {'prob':>6}  {'|h|':>7}  h[0:{shown}]")

    def show(steps: Steps) -> None:
        assert steps.states is not None
        assert steps.probabilities is not None
        for step, state, probabilities in zip(steps.steps.tolist(), steps.states, steps.probabilities, strict=True):
            best = int(probabilities.argmax())
            components = "".join(f"{value:+7.3f}" for value in state[:shown])
            click.echo(
                f"{step:>6}  {labels[best]:<{width}}  {probabilities[best]:>6.4f}"
                f"  {np.linalg.norm(state):>7.3f} {components}{more}"
            )

    return show
