"""`unroll classify`: the class of every sequence of files."""

import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

import click
from click.core import ParameterSource

from unroll_client.cli.backends import Backend, serving
from unroll_client.cli.locations import Location, RemotePath, location
from unroll_client.cli.options import Server, one_line_errors, server_options
from unroll_client.cli.outputs import PARQUET, kind_of, to_terminal
from unroll_client.cli.pipeline import IN_FLIGHT, Input, classified
from unroll_client.cli.progress import progress
from unroll_client.cli.report import Score
from unroll_client.cli.results import Parts, Results, stream
from unroll_client.cli.termination import terminable
from unroll_proto.cli import InputError
from unroll_proto.sequences import STDIN, SequenceError, count_sequences, find_sources
from unroll_proto.sequences.options import column_options, columns_of


@dataclass(frozen=True, slots=True)
class Target:
    """Where the results go.

    Attributes:
        output: A file, or a folder of parts; None for standard output.
        refused: File for the refused rows; None without one.
        resume: True to keep progress, and to go on with an unfinished run.
    """

    output: Location | None
    refused: Location | None
    resume: bool

    @property
    def is_folder(self) -> bool:
        """True if the output is a folder of parts."""
        return self.output is not None and (self.output.is_dir() or not self.output.suffix)

    def check(self, inputs: list[str]) -> None:
        """Raises InputError if nothing can be written there."""
        if self.resume and (self.output is None or STDIN in inputs):
            what = "-o is needed" if self.output is None else "standard input can't be read again"
            raise InputError(f"--resume: {what}")
        if self.output is not None and not self.is_folder:
            kind_of(self.output)
        for path in [each for each in (self.output, self.refused) if each is not None]:
            if isinstance(path, Path) and not path.parent.is_dir():
                raise InputError(f"{path}: there is no folder {path.parent}")
            if any(_is_same(path, word) for word in inputs):
                raise InputError(f"{path}: is the input")
        if self.refused is not None and self.refused.is_dir():
            raise InputError(f"{self.refused}: is a folder")

    @contextmanager
    def results(self, run: dict[str, object]) -> Iterator[Results]:
        """Yields the writer of the results; on failure, only parts stay.

        Args:
            run: What a later run must share to go on with this one.
        """
        if self.output is None:
            with stream(to_terminal(as_json=not sys.stdout.isatty()), self.refused) as made:
                yield made
        elif self.is_folder:
            yield Parts(self.output, kind_of(Path(PARQUET)), PARQUET, self.refused, run, self.resume, None)
        else:
            folder = self.output.parent / f".{self.output.name}.parts"
            kind = kind_of(self.output)
            # An upload that fails after hours would lose them.
            if self.resume or isinstance(folder, RemotePath) or folder.exists():
                yield Parts(folder, kind, self.output.suffix, self.refused, run, self.resume, self.output)
            else:
                with stream((self.output, kind), self.refused) as made:
                    yield made


def _is_same(path: Location, word: str) -> bool:
    if isinstance(path, RemotePath):
        return str(path) == word
    return path.exists() and Path(word).exists() and path.samefile(word)


@click.command("classify", short_help="Classifies every sequence of files.")
@click.argument("inputs", nargs=-1, required=True, metavar="IN...")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Compute in this process with the model of this folder, such as models/jv, instead of asking a server.",
)
@click.option("--model", default="", metavar="NAME", help="Model to ask; not needed if only one is served.")
@click.option("--model-version", type=click.IntRange(min=1), metavar="N", help="Model version.  [default: the newest]")
@click.option(
    "-o",
    "--output",
    type=location,
    metavar="OUT",
    help="Write a .parquet, .jsonl or .csv file, which appears when complete; or a folder of Parquet"
    " files, if the name has no suffix; either may be a URL.  [default: standard output]",
)
@click.option("--resume", is_flag=True, help="Keep progress beside OUT, and go on where a run that was killed stopped.")
@click.option(
    "--on-error",
    default="fail",
    show_default=True,
    metavar="fail|skip|FILE",
    help="Row or file that can't be used: end; skip it; or skip it and write the reason to FILE, as JSON Lines.",
)
@column_options
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    metavar="SECONDS",
    help="Wait so long for a server that is away, also at the beginning.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 64),
    default=IN_FLIGHT,
    show_default=True,
    help="Blocks of sequences to compute at a time.",
)
@server_options
def classify_command(
    inputs: tuple[str, ...],
    bundle: Path | None,
    model: str,
    model_version: int | None,
    output: Location | None,
    resume: bool,
    on_error: str,
    wait: float,
    concurrency: int,
    **options: Any,
) -> None:
    """Classifies every sequence of files, folders, globs, URLs, or - for standard input.

    The output has the columns id, label, probability (of that label), probabilities and logits (lists). A summary
    follows, and, where the input has labels, accuracy and confusion matrix. Without -o, lines for people go to a
    terminal, and JSON Lines to anything else. Memory doesn't grow with the input.

    Exit codes: 0 done, also if --on-error let rows be skipped; 1 the server or the work failed; 2 the command line or
    the input can't be used, or no row of it; 130 interrupted; 143 terminated.
    """
    columns = columns_of(options)
    server = Server(**options)
    tolerant = on_error != "fail"
    target = Target(output, location(on_error) if on_error not in ("fail", "skip") else None, resume)
    target.check(list(inputs))
    with one_line_errors(server), terminable():
        source = Input(find_sources(inputs), columns, tolerant)
        run = _Run(source, target, concurrency)
        asyncio.run(run.over(_local(bundle) if bundle else serving(server, model, model_version or 0, wait)))
    run.report()


def _local(path: Path) -> AbstractAsyncContextManager[Backend]:
    """Returns the backend of a bundle.

    Raises:
        InputError: an option of servers is used beside it, or the engine is not installed.
    """
    context = click.get_current_context()
    of_servers = {"model", "model_version", "wait", *(field.name for field in fields(Server))}
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in of_servers and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            hint = "; choose a model by its folder, such as models/jv" if name.startswith("model") else ""
            raise InputError(f"--bundle: not with {parameter.opts[0]}, which is for servers{hint}")
    try:
        from unroll_client.cli.local import loaded
    except ModuleNotFoundError as error:
        raise InputError(f"--bundle needs {error.name}: pip install 'unroll-client[local]'") from None
    return loaded(path)


class _Run:
    """One run over the input.

    Args:
        source: The input.
        target: Where the results go.
        concurrency: Blocks at a time.
    """

    def __init__(self, source: Input, target: Target, concurrency: int) -> None:
        self._source, self._target, self._concurrency = source, target, concurrency
        self._done = self._refused = self._before = 0
        self._first_problem: SequenceError | None = None
        self._seconds = 0.0
        self._summary = ""

    def _counts(self) -> dict[str, Any]:
        return {"done": self._done, "refused": self._refused, "score": self._score.state()}

    async def over(self, opened: AbstractAsyncContextManager[Backend]) -> None:
        """Classifies all.

        Raises:
            SequenceError: the input can't be used.
            UnrollError: a call failed.
        """
        total = count_sequences(self._source.sources)
        async with opened as backend:
            self._score = Score(backend.class_labels)
            described = {"model": [backend.name, backend.version], "blocks": backend.block_size}
            with self._target.results({**self._source.described(), **described}) as results:
                if results.saved is not None:
                    self._done, self._refused = results.saved["done"], results.saved["refused"]
                    self._score.restore(results.saved["score"])
                    self._before = self._done
                if not results.is_done:
                    await self._classify(backend, results, total)
        self._summary = f"{self._done} sequences classified by {backend.name} version {backend.version}"

    async def _classify(self, backend: Backend, results: Results, total: int | None) -> None:
        begin = time.monotonic()
        hidden = self._target.output is None and sys.stdout.isatty()
        with progress(total, self._done + self._refused, hidden) as show:
            async with aclosing(classified(backend, self._source, results.begin, self._concurrency)) as blocks:
                async for block, result, after in blocks:
                    if result is not None:
                        self._score.add(block.labels, result)
                    self._done += len(block)
                    self._refused += len(block.refused)
                    if block.refused and self._first_problem is None:
                        self._first_problem = block.refused[0]
                    results.add(block, result, after, self._counts)
                    show(self._done + self._refused, self._refused)
        if self._refused and not self._done:
            raise InputError(f"no row can be used; the first: {self._first_problem}")
        results.finish(self._counts())
        self._seconds = time.monotonic() - begin

    def report(self) -> None:
        """Prints the summary, and accuracy and confusion matrix if there are labels."""
        output, score = self._target.output, self._score
        # Without a file, only the results go to standard output.
        # click's own streams would drop characters that their encoding lacks.
        stream = sys.stdout if output else sys.stderr
        if self._refused:
            where = f" (see {self._target.refused})" if self._target.refused else ""
            self._summary += f", {self._refused} refused{where}"
        if self._seconds:
            self._summary += f", {(self._done - self._before) / self._seconds:.0f}/s"
        click.echo(f"{self._summary}{f' -> {output}' if output else ''}", file=stream)
        if self._done:
            click.echo(score.classes(), file=stream)
        if score.labelled:
            click.echo(score.summary(), file=stream)
            click.echo(score.table(get_terminal_size().columns), file=stream)
