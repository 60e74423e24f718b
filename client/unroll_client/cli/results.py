"""Results of `unroll classify`: written as they come, or in parts with which a killed run is resumed."""

import glob
import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Final, Protocol

from unroll_client._types import Classification
from unroll_client.cli.locations import Location, replacing
from unroll_client.cli.outputs import GROUP_ROWS, Kind, Output, file_errors, to_json, writing
from unroll_client.cli.pipeline import Position
from unroll_proto.cli import InputError
from unroll_proto.sequences import Block, SequenceError

_DONE: Final = "_SUCCESS"
_STATE: Final = "_state.json"
# Files of a run, also those that are being written.
_OF_RUN: Final = re.compile(r"\.?(part-\d|_refused-|_state\.|_SUCCESS)")


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
def stream(output: Output | tuple[Location, Kind], refused: Location | None) -> Iterator[Results]:
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
    """Results in numbered files of a folder, each of which appears as a whole.

    `_state.json` in it tells how far they reach; it is replaced after each part. A part beyond is written again, with
    the same bytes. So objects of a store do as well as files: nothing is appended to, renamed or locked.

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
        InputError: the folder holds something else, another run, or one that is not to be resumed.
    """

    def __init__(
        self,
        folder: Location,
        kind: Kind,
        suffix: str,
        refused: Location | None,
        run: Any,
        resume: bool,
        joined: Location | None,
    ) -> None:
        self._folder, self._kind, self._suffix, self._refused, self._joined = folder, kind, suffix, refused, joined
        self._run = json.loads(json.dumps(run))
        self._writer = secrets.token_hex(8)
        self._parts = 0
        self.begin, self.is_done = Position(), False
        self.saved: dict[str, Any] | None = None
        self._held: list[tuple[Sequence[str], Classification]] = []
        self._problems: list[SequenceError] = []
        with file_errors(folder):
            self._load(resume)
            self._after = self.begin
            if self.is_done:
                self._clean()
            else:
                self._save(_STATE, self.saved)

    def _load(self, resume: bool) -> None:
        if isinstance(self._folder, Path):
            self._folder.mkdir(exist_ok=True)
        state = self._read(_DONE)
        self.is_done = state is not None
        state = state or self._read(_STATE)
        if state is None and not all(path.name.startswith((".", "_")) for path in self._folder.iterdir()):
            raise InputError(f"{self._folder}: is not empty; name a new folder")
        if state is None or not (state["parts"] or self.is_done):
            return
        if not resume:
            kind = "a finished run" if self.is_done else "an unfinished run: --resume goes on with it"
            raise InputError(f"{self._folder}: holds {kind}; or remove the folder")
        if state["run"] != self._run:
            keys = sorted(key for key in self._run if state["run"].get(key) != self._run[key])
            what = f"holds another run ({', '.join(keys)} differ); remove the folder, or name another output"
            raise InputError(f"{self._folder}: {what}")
        self._parts, self.begin, self.saved = state["parts"], Position(*state["position"]), state["counts"]

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            state: dict[str, Any] = json.loads((self._folder / name).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            raise InputError(f"{self._folder}: holds the {name} of another program; name a new folder") from None
        return state

    def _save(self, name: str, counts: Any) -> None:
        state = {"run": self._run, "parts": self._parts, "position": self._after, "counts": counts}
        with replacing(self._folder / name) as file:
            file.write(json.dumps({**state, "writer": self._writer}).encode())

    def add(self, block: Block, result: Classification | None, after: Position, counts: Callable[[], Any]) -> None:
        """Holds the results until there are enough for a part."""
        if result is not None:
            self._held.append((block.ids, result))
        self._problems += block.refused
        self._after = after
        if max(sum(len(ids) for ids, _ in self._held), len(self._problems)) >= GROUP_ROWS:
            self._commit(counts())

    def _commit(self, counts: Any) -> None:
        with file_errors(self._folder):
            # A store has no locks: of two processes, the one that began later goes on.
            if (self._read(_STATE) or {}).get("writer") != self._writer:
                raise InputError(f"{self._folder}: another process writes it")
        header = self._joined is None or not self._parts
        with writing(self._part(self._parts), self._kind, header=header) as output:
            for ids, result in self._held:
                output.write(ids, result)
        with file_errors(self._folder):
            if self._refused is not None:
                with replacing(self._problems_of(self._parts)) as file:
                    file.write(_lines(self._problems))
            self._parts += 1
            self._save(_STATE, counts)
        self._held, self._problems = [], []

    def _part(self, number: int) -> Location:
        return self._folder / f"part-{number:05d}{self._suffix}"

    def _problems_of(self, number: int) -> Location:
        return self._folder / f"_refused-{number:05d}.jsonl"

    def finish(self, counts: Any) -> None:
        """Writes the last part; then the refused rows, the joined file, and the mark of a finished run."""
        if self._held or self._problems or not self._parts:
            self._commit(counts)
        numbers = range(self._parts)
        if self._refused is not None:
            with file_errors(self._refused), replacing(self._refused) as file:
                _join(map(self._problems_of, numbers), file)
        if self._joined is not None:
            with file_errors(self._joined), replacing(self._joined) as file:
                getattr(self._kind, "join", _join)(map(self._part, numbers), file)
        with file_errors(self._folder):
            self._save(_DONE, counts)
            self._clean()

    def _clean(self) -> None:
        """Removes the progress, what killed runs left, and a folder whose parts are joined."""
        for final in (self._joined, self._refused):
            if isinstance(final, Path):
                for path in final.parent.glob(f".{glob.escape(final.name)}.*.tmp"):
                    path.unlink(missing_ok=True)
        kept = {_DONE, *(self._part(number).name for number in range(self._parts) if self._joined is None)}
        for each in self._folder.iterdir():
            if _OF_RUN.match(each.name) and each.name not in kept:
                each.unlink(missing_ok=True)
        if self._joined is not None:
            (self._folder / _DONE).unlink()
            if isinstance(self._folder, Path):
                self._folder.rmdir()


def _join(paths: Iterable[Location], file: IO[bytes]) -> None:
    for path in paths:
        file.write(path.read_bytes())


def _lines(problems: Iterable[SequenceError]) -> bytes:
    """Returns a JSON line for each refused row."""
    records = ({"file": e.file, "row": e.row, "column": e.column, "reason": e.reason} for e in problems)
    return "".join(to_json(record) + "\n" for record in records).encode(errors="backslashreplace")
