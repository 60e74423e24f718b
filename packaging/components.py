"""Lists the software of an image or environment: as an SBOM in CycloneDX 1.6, or as Unroll's NOTICE.

    python packaging/components.py sbom unroll-server 0.1.0 /opt/unroll > sbom.cdx.json
    python packaging/components.py notice .venv > NOTICE

It runs inside the images, on whatever Python they have, and so needs the standard library alone.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distributions
from pathlib import Path

LICENCE = "Apache-2.0"
DATA = "aeon"
"""Distribution in the training image that no other requires: it holds the JapaneseVowels data."""
NAMESPACE = uuid.UUID("6f0f3f5c-7a0f-5d3e-9a53-0c5a3e0f6b1d")

PREFACE = """Unroll
Copyright 2026 The Unroll authors

Unroll is licensed under the Apache License, Version 2.0; see LICENSE.

The compiled modules in the wheels of unroll-engine and unroll-server hold nanobind (Copyright (c) 2022 Wenzel Jakob,
BSD-3-Clause; see engine/LICENSE.nanobind); that of unroll-server also holds nghttp2 (Copyright (c) 2012 Tatsuhiro
Tsujikawa and contributors, MIT; see server/LICENSE.nghttp2) and zlib (Copyright (C) 1995 Jean-loup Gailly and Mark
Adler, Zlib; see server/LICENSE.zlib). The page in the wheel of unroll-web holds Svelte (Copyright (c) 2016-2025 Svelte
Contributors, MIT; see web/LICENSE.svelte). Otherwise the wheels of Unroll hold no code of others.
proto/unroll_proto/inference restates the names and numbers of the Open Inference Protocol
(kserve/open-inference-protocol, Apache-2.0) and of Triton's extensions to it (triton-inference-server/common,
BSD-3-Clause).

Installing the wheels, or building the images, brings the Python packages below, each under its own licence, whose text
is in the package's *.dist-info folder. A build of torch for CUDA brings NVIDIA's libraries too, under NVIDIA's
licences. The images also hold CPython (PSF-2.0) and packages of Debian, among them HAProxy (GPL-2.0-or-later) in the
gateway's and Redis (BSD-3-Clause) in redis'; their licences are in /usr/share/doc/*/copyright.
/usr/share/doc/unroll/sbom.cdx.json of an image lists all that is in it, with versions.
"""


@dataclass(frozen=True)
class Component:
    """One piece of software.

    Attributes:
        name: As its package index names it.
        version: Of the package.
        purl: Package URL, unique among components.
        expression: SPDX expression of its licence; "" if it states none.
        licences: Names of licences, if there is no expression.
        requires: Names of Python packages that it needs, present or not.
    """

    name: str
    version: str
    purl: str
    expression: str = ""
    licences: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    kind: str = field(default="library")

    def licence(self) -> str:
        """Returns the licence in one line."""
        return self.expression or ", ".join(self.licences) or "see its files"


def canonical(name: str) -> str:
    """Returns a distribution's name as PyPI compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def python_components(prefix: Path) -> Iterator[Component]:
    """Yields the Python distributions of a virtual environment or prefix."""
    folders = [str(folder) for folder in prefix.glob("lib/python3*/site-packages")]
    for each in distributions(path=folders):
        name = canonical(each.metadata["Name"])
        expression, licences = _licence_of(each)
        requires = [re.match(r"[\w.-]+", line) for line in each.requires or [] if _is_required(name, line)]
        names = tuple(canonical(match[0]) for match in requires if match)
        yield Component(name, each.version, f"pkg:pypi/{name}@{each.version}", expression, licences, names)


def _is_required(name: str, requirement: str) -> bool:
    """Extras of others are not asked for; those of Unroll count if what they name is there."""
    return name.startswith("unroll-") or not re.search(r";.*\bextra\b", requirement)


def _licence_of(each: Distribution) -> tuple[str, tuple[str, ...]]:
    fields = each.metadata
    if expressions := fields.get_all("License-Expression"):
        return expressions[0], ()
    classifiers = [
        line.rpartition(" :: ")[2] for line in fields.get_all("Classifier") or [] if line.startswith("License")
    ]
    named = [text for text in classifiers if text != "OSI Approved"]
    if not named:
        files = [file for file in each.files or [] if "LICENSE" in file.name.upper()]
        # Some put the whole text into the field; the first line of it names the licence.
        texts = [*(fields.get_all("License") or []), *(file.read_text() for file in files)]
        named = [text.strip().splitlines()[0] for text in texts if text.strip()][:1]
    return "", tuple(sorted(named))


def debian_components() -> Iterator[Component]:
    """Yields the Debian packages of this machine; none if it isn't Debian."""
    if not shutil.which("dpkg-query"):
        return
    form = "${Package}\t${Version}\t${Architecture}\n"
    listed = subprocess.run(["dpkg-query", "-W", "-f", form], capture_output=True, text=True, check=True)  # noqa: S603, S607
    for line in listed.stdout.splitlines():
        name, version, architecture = line.split("\t")
        copyright_file = Path("/usr/share/doc", name, "copyright")
        text = copyright_file.read_text(errors="replace") if copyright_file.is_file() else ""
        # In the machine-readable format by name; else by the text that it points to.
        named = re.findall(r"^License: (\S.*\S)", text, re.MULTILINE)
        named = named or re.findall(r"/usr/share/common-licenses/([\w.+-]*\w)", text)
        licences = tuple(sorted(set(named)))
        purl = f"pkg:deb/debian/{name}@{version.replace(':', '%3A').replace('+', '%2B')}?arch={architecture}"
        yield Component(name, version, purl, licences=licences)


def interpreter() -> Component:
    """Returns the Python that runs this."""
    version = platform.python_version()
    return Component("cpython", version, f"pkg:generic/cpython@{version}", "PSF-2.0", kind="platform")


def sbom(name: str, version: str, components: list[Component]) -> dict[str, object]:
    """Returns a CycloneDX 1.6 document of an image; the same components give the same document."""
    refs = {component.name: component.purl for component in components if component.purl.startswith("pkg:pypi/")}
    top = f"pkg:oci/{name}@{version}"
    depends = [
        {"ref": each.purl, "dependsOn": sorted({refs[other] for other in each.requires if other in refs})}
        for each in components
    ]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, json.dumps([name, version, *map(str, components)]))}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "container",
                "bom-ref": top,
                "name": name,
                "version": version,
                "licenses": [{"expression": LICENCE}],
            }
        },
        "components": [_as_cyclonedx(component) for component in components],
        "dependencies": [{"ref": top, "dependsOn": sorted(each.purl for each in components)}, *depends],
    }


def _as_cyclonedx(component: Component) -> dict[str, object]:
    if component.expression:
        licences: list[object] = [{"expression": component.expression}]
    else:
        licences = [{"license": {"name": name}} for name in component.licences]
    return {
        "type": component.kind,
        "bom-ref": component.purl,
        "name": component.name,
        "version": component.version,
        "purl": component.purl,
        **({"licenses": licences} if licences else {}),
    }


def notice(components: list[Component]) -> str:
    """Returns NOTICE: what the distributions of Unroll require, directly or not, with licences."""
    by_name = {component.name: component for component in components}
    found: set[str] = set()
    waiting = [DATA, *(name for name in by_name if name.startswith("unroll-"))]
    while waiting:
        name = waiting.pop()
        # aeon is data here: nothing that it requires is installed for it.
        if name in by_name and name not in found:
            found.add(name)
            waiting.extend(() if name == DATA else by_name[name].requires)
    third = [by_name[name] for name in sorted(found) if not re.match(r"(unroll|nvidia|cuda|triton)\b", name)]
    return PREFACE + "\n" + "".join(f"- {each.name}: {each.licence()}\n" for each in third)


def main() -> None:
    """Writes to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    bom = kinds.add_parser("sbom", help="SBOM of this image, CycloneDX JSON")
    bom.add_argument("name")
    bom.add_argument("version")
    bom.add_argument("prefix", nargs="?", type=Path, help="where Python packages are: a virtual environment")
    kinds.add_parser("notice", help="NOTICE").add_argument("prefix", type=Path)
    given = parser.parse_args()
    python = sorted(python_components(given.prefix), key=lambda each: each.purl) if given.prefix else []
    if given.kind == "notice":
        sys.stdout.write(notice(python))
    else:
        system = [interpreter(), *sorted(debian_components(), key=lambda each: each.purl)]
        json.dump(sbom(given.name, given.version, [*python, *system]), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
