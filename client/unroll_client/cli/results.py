"""Results of `unroll classify`: written as they come, or in parts with which a killed run is resumed."""

import fcntl
import glob
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Final, Protocol

from unroll_client._types import Classification
from unroll_client.cli.outputs import GROUP_ROWS, Kind, Output, file_errors, to_json, writing
from unroll_client.cli.pipeline import Position
from unroll_proto.cli import InputError
from unroll_proto.files import replacing
from unroll_proto.sequences import Block, SequenceError

DONE: Final = "_SUCCESS"
_WORK, _STATE = "_unroll", "state.json"


class Results(Protocol):
    """Where results go.

    Attributes:
        begin: Position from which the run goes on.
        saved: Counts at that position; None at the beginning.
        is_done: True if the run was finished before.
    """

    begin: Position
    saved: dict[str, Any] | None
    is_done: bool

    def add(self, block: Block, result: Classification | None, after: Position, counts: Callable[[], Any]) -> None:
        """Takes the results of a block."""

    def finish(self, counts: Any) -> None:
        """Completes the output."""


class Stream:
    """Results written to one output as they come.

    Args:
        output: Takes the results.
        refused: Takes a JSON line for each refused row; None to drop them.
    """

    def __init__(self, output: Output, refused: IO[bytes] | None) -> None:
        self.begin, self.is_done = Position(), False
        self.saved: dict[str, Any] | None = None
        self._output, self._refused = output, refused

    def add(self, block: Block, result: Classification | None, after: Position, counts: Callable[[], Any]) -> None:
        """Writes."""
        if result is not None:
            self._output.write(block.ids, result)
        if self._refused is not None:
            self._refused.write(_lines(block.refused))

    def finish(self, counts: Any) -> None:
        """Does nothing; the contexts of the files complete them."""


@contextmanager
def stream(output: Output | tuple[Path, Kind], refused: Path | None) -> Iterator[Results]:
    """Yields results that go to an output or a file; files appear at the end, or not at all."""
    with ExitStack() as stack:
        lines = None
        if refused is not None:
            stack.enter_context(file_errors(refused))
            lines = stack.enter_context(replacing(refused))
        made = stack.enter_context(writing(*output)) if isinstance(output, tuple) else output
        yield Stream(made, lines)
        if not isinstance(output, tuple):
            made.finish()


class Parts:
    """Results in numbered files of a folder, which are complete at any moment.

    `_unroll/state.json` in it tells how far they reach; it is replaced after each part. Files beyond are leftovers of a
    killed run.

    Args:
        folder: The folder; it is made if there is none.
        kind: Makes the writer of a part.
        suffix: Suffix of the parts.
        refused: File for the refused rows, written at the end; None to drop them.
        run: The run, as JSON; only the same one is resumed.
        resume: True to go on with an unfinished run.
        joined: File to make of the parts at the end, in place of the folder; None to keep the folder.

    Attributes:
        begin: Position from which the run goes on.
        saved: Counts at that position; None at the beginning.
        is_done: True if the run was finished before.

    Raises:
        InputError: the folder holds something else, another run, one that goes on, or one that is not to be resumed.
    """

    def __init__(
        self, folder: Path, kind: Kind, suffix: str, refused: Path | None, run: Any, resume: bool, joined: Path | None
    ) -> None:
        self._folder, self._kind, self._suffix, self._refused, self._joined = folder, kind, suffix, refused, joined
        self._run = json.loads(json.dumps(run))
        self._work = folder / _WORK
        self._parts = 0
        self.begin, self.is_done = Position(), False
        self.saved: dict[str, Any] | None = None
        self._held: list[tuple[Sequence[str], Classification]] = []
        self._problems: list[SequenceError] = []
        with file_errors(folder):
            self._load(resume)
        self._after = self.begin

    def _load(self, resume: bool) -> None:
        found = next((path for path in (self._folder / DONE, self._work / _STATE) if path.exists()), None)
        if found is None:
            if self._folder.exists() and not self._work.exists() and any(self._folder.iterdir()):
                raise InputError(f"{self._folder}: is not empty; name a new folder")
        elif not resume:
            kind = "an unfinished run: --resume goes on with it" if found.name == _STATE else "a finished run"
            raise InputError(f"{self._folder}: holds {kind}; or remove the folder")
        else:
            state = json.loads(found.read_text())
            if state["run"] != self._run:
                keys = sorted(key for key in self._run if state["run"].get(key) != self._run[key])
                what = f"holds another run ({', '.join(keys)} differ); remove the folder, or name another output"
                raise InputError(f"{self._folder}: {what}")
            self._parts, self.begin, self.saved = state["parts"], Position(*state["position"]), state["counts"]
            self.is_done = found.name == DONE
        if self.is_done:
            shutil.rmtree(self._work, ignore_errors=True)
            return
        self._work.mkdir(parents=True, exist_ok=True)
        self._lock = (self._work / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self._folder}: another process writes it") from None
        for path in [*self._folder.iterdir(), *self._work.iterdir()]:
            number = path.name.partition("-")[2].partition(".")[0]
            is_newer = number.isdecimal() and int(number) >= self._parts
            if path.is_file() and (
                path.name.startswith(".") or (path.name.startswith(("part-", "refused-")) and is_newer)
            ):
                path.unlink()
        for final in filter(None, (self._joined, self._refused)):
            for path in final.parent.glob(f".{glob.escape(final.name)}.*.tmp"):
                path.unlink()

    def add(self, block: Block, result: Classification | None, after: Position, counts: Callable[[], Any]) -> None:
        """Holds the results until there are enough for a part."""
        if result is not None:
            self._held.append((block.ids, result))
        self._problems += block.refused
        self._after = after
        if max(sum(len(ids) for ids, _ in self._held), len(self._problems)) >= GROUP_ROWS:
            self._commit(counts())

    def _commit(self, counts: Any) -> None:
        header = self._joined is None or not self._parts
        with writing(self._part(self._parts), self._kind, header=header) as output:
            for ids, result in self._held:
                output.write(ids, result)
        with file_errors(self._folder):
            if self._refused is not None:
                with replacing(self._problems_of(self._parts)) as file:
                    file.write(_lines(self._problems))
            self._parts += 1
            state = {"run": self._run, "parts": self._parts, "position": self._after, "counts": counts}
            with replacing(self._work / _STATE) as file:
                file.write(json.dumps(state).encode())
        self._held, self._problems = [], []

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}{self._suffix}"

    def _problems_of(self, number: int) -> Path:
        return self._work / f"refused-{number:05d}.jsonl"

    def finish(self, counts: Any) -> None:
        """Writes the last part; then the refused rows, and the file or the mark of a finished folder."""
        if self._held or self._problems or not self._parts:
            self._commit(counts)
        numbers = range(self._parts)
        if self._refused is not None:
            with file_errors(self._refused), replacing(self._refused) as file:
                _join(map(self._problems_of, numbers), file)
        if self._joined is None:
            with file_errors(self._folder):
                (self._work / _STATE).replace(self._folder / DONE)
                shutil.rmtree(self._work)
            return
        with file_errors(self._joined), replacing(self._joined) as file:
            getattr(self._kind, "join", _join)(map(self._part, numbers), file)
        shutil.rmtree(self._folder)


def _join(paths: Iterable[Path], file: IO[bytes]) -> None:
    for path in paths:
        with path.open("rb") as part:
            shutil.copyfileobj(part, file, 1 << 20)


def _lines(problems: Iterable[SequenceError]) -> bytes:
    """Returns a JSON line for each refused row."""
    records = ({"file": e.file, "row": e.row, "column": e.column, "reason": e.reason} for e in problems)
    return "".join(to_json(record) + "\n" for record in records).encode(errors="backslashreplace")
