"""Code blocks of the documentation, and what a reader does with them: reads, types, copies."""

import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple, Self

import yaml

from support.processes import BIN, TRAINING_BIN

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples/README.md"]
_FENCE = re.compile(r'```(\w*)((?: (?:needs|not-run)="[^"]+")*)')


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        page: The file.
        line: Line of its fence, from 1.
        language: First word of the fence.
        needs: What it needs besides Unroll: modules, programs (`needs`).
        not_run: Why it does not run here (`not-run`); empty if it runs.
        code: The text between the fences.
    """

    page: Path
    line: int
    language: str
    needs: list[str]
    not_run: str
    code: str

    @classmethod
    def all_of(cls, page: Path) -> list[Self]:
        """Returns the blocks of a page in their order.

        Raises:
            AssertionError: a block has no fence, or its fence an unknown attribute.
        """
        found = []
        lines = iter(enumerate(page.read_text().splitlines(keepends=True), 1))
        before = ""
        for number, line in lines:
            indented = line.startswith("    ") and (before.startswith("#") or not before.strip())
            assert not indented, f"{page.name}:{number}: a block of code without a fence"
            before = line
            if not line.startswith("```"):
                continue
            fence = _FENCE.fullmatch(line.strip())
            assert fence, f"{page.name}:{number}: {line}"
            attributes = dict(re.findall(r'([a-z-]+)="([^"]+)"', fence[2]))
            code = []
            for _, text in lines:
                if text == "```\n":
                    break
                code.append(text)
            needs, reason = attributes.get("needs", "").split(), attributes.get("not-run", "")
            found.append(cls(page, number, fence[1], needs, reason, "".join(code)))
        return found

    def check(self) -> None:
        """Raises an error if its language is unknown, or if the block is not in this language."""
        CHECKS[self.language](self.code)


def _check_json(code: str) -> None:
    """Parses JSON in which `...` stands for what is left out."""
    json.loads(re.sub(r",?\s*\.\.\.", "", code))


def _check_shell(code: str) -> None:
    """Checks the syntax, the options of Unroll's commands, targets of make, and paths of the repository."""
    parsed = subprocess.run(["bash", "-n"], input=code, text=True, capture_output=True, check=False)
    assert parsed.returncode == 0, parsed.stderr
    for command in commands(code):
        if command[0] == "make":
            rules = (ROOT / "Makefile").read_text()
            assert all("=" in word or re.search(rf"^{word}:", rules, re.MULTILINE) for word in command[1:]), command
        for position, word in enumerate(command):
            if re.fullmatch(r"unroll(-[a-z]+)?", word):  # also behind `docker run`
                _check_options(command[position:])
            elif " " in word and "unroll-" in word:  # behind `sh -c`
                _check_shell(word)
            elif word.partition("/")[0] in ("deploy", "docs", "examples"):
                assert (ROOT / word).exists(), word


def _check_options(command: list[str]) -> None:
    """Checks that a command of Unroll has the options that it is given."""
    name, *words = command
    if words and words[0][0] != "-" and f"\n  {words[0]} " in _help(name):
        name += f" {words[0]}"
    elif name == "unroll":
        return  # a name, not the command
    for word in words:
        assert not word.startswith("--") or f"{word.partition('=')[0]} " in _help(name), f"{name} has no {word}"


@cache
def _help(name: str) -> str:
    command, *rest = name.split()
    folder = BIN if (BIN / command).exists() else TRAINING_BIN
    return subprocess.run([folder / command, *rest, "--help"], capture_output=True, text=True, check=True).stdout


def commands(code: str) -> Iterator[list[str]]:
    """Yields the words of each command of a script."""
    for line in logical_lines(code):
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if re.fullmatch("[&|;]+", word):
                yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words


def logical_lines(code: str) -> list[str]:
    """Returns the lines of a script, those that end with a backslash together with the next one."""
    return code.replace("\\\n", " ").splitlines()


CHECKS: dict[str, Callable[[str], object]] = {
    "json": _check_json,
    "mermaid": str.strip,
    "python": lambda code: compile(code, "block", "exec"),
    "sh": _check_shell,
    "text": str.strip,
    "toml": tomllib.loads,
    "yaml": yaml.safe_load,
}
"""How a block of each language is checked, if it runs or not."""
