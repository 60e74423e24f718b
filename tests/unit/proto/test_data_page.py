"""docs/data.md: every example makes a file that is read."""

import re
from pathlib import Path

import pytest

from unroll_proto.sequences import SUFFIXES, read_sequences

PAGE = Path(__file__).parents[3] / "docs" / "data.md"


def test_every_example_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        assert len(code.splitlines()) <= 5
        exec(code, {})  # noqa: S102 (the page's own examples)
    made = list(tmp_path.iterdir())
    assert {path.suffix for path in made} == {*SUFFIXES} - {".arrow", ".ndjson"}
    for path in made:
        lengths = [len(sequence.values) for sequence in read_sequences(path)]
        assert sorted(lengths) == ([2, 3] if path.suffix == ".npz" else [1, 2])
