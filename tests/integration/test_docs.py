"""Every code block of README.md, docs/ and examples/ runs as a reader runs it, or is at least checked.

The blocks of a page run in their order, in one folder. It has a model repository `models` with `jv`, and the test
split of JapaneseVowels as `sequences.parquet` and `sequences.jsonl`. localhost:50051 and localhost:8080 are a server
and a web process, until the page starts its own. All Python of a page is one program.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.daemons import free_port
from support.pages import PAGES, ROOT, Block, logical_lines
from support.processes import BIN, PATIENCE, TRAINING_BIN, AnnouncedProcess, ServerProcess, WebProcess, made_by_make

from unroll_proto.sequences import Sequence, write_sequences

ADDRESS = re.compile(r"\b(?:localhost|127\.0\.0\.1):(\d+)")
SERVERS = ("unroll-serve", "unroll web")


class Reader:
    """Runs the blocks of a page.

    Args:
        folder: The folder to run them in.
        patch: Sets the environment.
        stack: Ends what was started.
        addresses: HOST:PORT of the processes that stand on the ports of the documentation.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, stack: ExitStack, addresses: dict[str, str]) -> None:
        self._folder, self._patch, self._stack, self._addresses = folder, patch, stack, addresses
        self._names: dict[str, Any] = {"__name__": "page"}

    def run(self, block: Block) -> None:
        """Runs a block; skips the test if something that it needs is not here."""
        python = None
        for name in block.needs:
            if (ROOT / "Makefile").read_text().count(f".venv-{name}/done:"):
                python = made_by_make(f".venv-{name}") / "bin/python"
            elif not (shutil.which(name) or importlib.util.find_spec(name)):
                pytest.skip(f"{name} is not installed")
        code = ADDRESS.sub(lambda match: self._address(match[1]), block.code)
        if block.language == "sh":
            self._patch.setenv("UNROLL_SERVER", self._address("50051"))
            self._shell(code)
        elif python:
            self._finish([python, "-c", code])
        else:
            lines = "\n" * block.line  # so that errors name the line of the page
            exec(compile(lines + code, str(block.page), "exec"), self._names)  # noqa: S102 (our own pages)

    def _address(self, port: str) -> str:
        return self._addresses.setdefault(port, f"127.0.0.1:{free_port()}")

    def _shell(self, code: str) -> None:
        """Runs a script; servers are left running until the end of the page."""
        script = "set -euo pipefail\n"
        for line in logical_lines(code):
            if line.startswith(SERVERS):
                self._finish(["bash", "-c", script])
                script = "set -euo pipefail\n"
                self._start(line)
            else:
                script += f"{line}\n"
        self._finish(["bash", "-c", script])

    def _start(self, line: str) -> None:
        name = line.split()[0]
        environment = {"UNROLL_LISTEN": "127.0.0.1:0", "UNROLL_WEB_LISTEN": "127.0.0.1:0"}
        log = self._folder / f"{name}.log"
        process = self._stack.enter_context(AnnouncedProcess(["bash", "-c", f"exec {line}"], log, environment))
        self._stack.callback(process.stop)
        self._addresses["50051" if name == "unroll-serve" else "8080"] = process.address.removeprefix("http://")
        self._patch.setenv("UNROLL_SERVER", self._address("50051"))

    def _finish(self, command: list[str | Path]) -> None:
        done = subprocess.run(
            command, cwd=self._folder, capture_output=True, text=True, timeout=5 * PATIENCE, check=False
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"


@pytest.fixture
def reader(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bundle_root: Path,
    server: ServerProcess,
    web: WebProcess,
    vowels: list[Sequence],
) -> Iterator[Reader]:
    shutil.copytree(bundle_root, tmp_path / "models")
    for suffix in (".parquet", ".jsonl"):
        write_sequences(tmp_path / f"sequences{suffix}", vowels)
    (tmp_path / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    monkeypatch.setenv("CURL_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(BIN), str(TRAINING_BIN), os.environ["PATH"]]))
    with ExitStack() as stack:
        addresses = {"50051": server.address, "8080": web.address.removeprefix("http://")}
        yield Reader(tmp_path, monkeypatch, stack, addresses)


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES])
def test_blocks_are_what_they_say(page: Path, request: pytest.FixtureRequest) -> None:
    blocks = Block.all_of(page)
    for block in blocks:
        block.check()
    if runnable := [block for block in blocks if block.language in ("python", "sh") and not block.not_run]:
        reader: Reader = request.getfixturevalue("reader")
        for block in runnable:
            reader.run(block)


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_kept_without_what_a_run_leaves(path: Path) -> None:
    """`make docs` runs them, and shows the outputs on the site."""
    notebook = json.loads(path.read_text())
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
