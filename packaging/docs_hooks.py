"""Hooks of the site of docs/: pages for the README, the notebooks, and files of the repository that pages link to."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = ROOT / "dist" / "notebooks"
"""The notebooks of docs/, with the outputs of a run."""
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^(```\w+) .*$", re.MULTILINE)
"""Fences that say how CI treats a block, which the site's Markdown would take for text."""
ALWAYS = ("CHANGELOG.md", *(f"proto/unroll_proto/v1/{name}.proto" for name in ("unroll", "admin", "bundle", "session")))
"""Files that the navigation names."""
REFERENCES = {
    "client": "unroll_client",
    "engine": "unroll_engine",
    "export": "unroll_export",
    "sequences": "unroll_proto.sequences",
}
"""Packages with a page of their public names."""


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages."""
    files.append(File.generated(config, "index.md", content=_text(ROOT / "README.md")))
    for name, package in REFERENCES.items():
        content = (
            f"# {package}\n\n::: {package}\n    options:\n      heading_level: 2\n      show_root_heading: false\n"
        )
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for uri, shown in _notebook(path):
            files.append(File.generated(config, uri, content=shown))
    waiting, done = [ROOT / name for name in ALWAYS], set[str]()
    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        waiting += _linked(page)
    while waiting:
        path = waiting.pop()
        uri = _uri(path)
        if uri in done:
            continue
        done.add(uri)
        files.append(File.generated(config, uri, content=_page(path)))
        if path.suffix == ".md":
            waiting += _linked(path)
    return files


def _notebook(path: Path) -> Iterator[tuple[str, str | bytes]]:
    """Yields the page of a notebook, and its pictures: their places in the site, and their content."""
    source = DOCS / path.relative_to(NOTEBOOKS.parent)
    exporter = MarkdownExporter(preprocessors=["nbconvert.preprocessors.CoalesceStreamsPreprocessor"])
    body, resources = exporter.from_filename(str(path))
    body = _rewritten(body, source).replace("```bash\n%%bash\n", "```bash\n")
    body = body.replace("![png](output_", f"![png]({path.stem}_")
    yield _uri(source), f"{body}\n[Download this notebook]({path.name}){{ download }}\n"
    for file, content in resources["outputs"].items():
        yield f"{Path(_uri(source)).parent}/{file.replace('output', path.stem, 1)}", content


def _linked(page: Path) -> list[Path]:
    """Returns the files of the repository, outside docs/, that a page links to."""
    found = ((page.parent / match[1]).resolve() for match in LINK.finditer(page.read_text()))
    return [path for path in found if path.exists() and path.is_relative_to(ROOT) and not path.is_relative_to(DOCS)]


def _uri(path: Path) -> str:
    """Returns the place in the site of a file of the repository."""
    if path == ROOT / "README.md":
        return "index.md"
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix().replace(".ipynb", ".md")
    name = path.relative_to(ROOT).as_posix()
    return f"source/{name}" if name.endswith(".md") else f"source/{name}.md"


def _page(path: Path) -> str:
    if path.suffix == ".md":
        return _text(path)
    name = path.relative_to(ROOT)
    if path.is_dir():
        return f"# {name}\n\n" + "".join(f"- `{each.name}`\n" for each in sorted(path.iterdir()) if each.name[0] != ".")
    language = {".yml": "yaml", ".proto": "protobuf"}.get(path.suffix, path.suffix[1:])
    return f"# {path.name}\n\n`{name}`\n\n````{language}\n{path.read_text()}````\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites links of the pages in docs/; generated pages come rewritten."""
    return markdown if page.file.generated_by else _rewritten(markdown, DOCS / page.file.src_uri)


def _text(path: Path) -> str:
    return _rewritten(path.read_text(), path)


def _rewritten(markdown: str, path: Path) -> str:
    """Returns a page whose links lead to pages of the site."""
    up = "../" * _uri(path).count("/")

    def link(match: re.Match[str]) -> str:
        target = (path.parent / match[1]).resolve()
        if not target.exists() or not target.is_relative_to(ROOT):
            return match[0]
        return f"]({up}{_uri(target)}{match[2] or ''})"

    return LINK.sub(link, FENCE.sub(r"\1", markdown))
