"""Malicious bundles: refused in one line, before an oversized file is read."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.bundles import edit, vouch

from unroll_proto import bundle as layout
from unroll_proto.bundle import BundleError, read_manifest, verify_bundle


@pytest.fixture
def bundle(bundle_root: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(bundle_root / "jv" / "1", tmp_path / "jv" / "1"))


def refused(bundle: Path) -> str:
    with pytest.raises(BundleError) as caught:
        verify_bundle(bundle)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1000
    return text


def size_of(name: str, size: int) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        next(each for each in manifest["artifacts"] if each["file"] == name)["sizeBytes"] = str(size)

    return change


@pytest.mark.parametrize("name", ["model.onnx", "model.ts", "weights.safetensors", "parity.json"])
def test_a_file_larger_than_its_network_is_refused_unread(bundle: Path, name: str) -> None:
    with (bundle / name).open("r+b") as file:
        file.truncate(2**40)  # a hole: reading it would take hours
    vouched = size_of(name, 2**40)
    edit(bundle / "manifest.json", vouched)
    assert f"{name}: {2**40} bytes, " in refused(bundle)


def test_a_huge_manifest_is_refused_unread(bundle: Path) -> None:
    with (bundle / "manifest.json").open("r+b") as file:
        file.truncate(2**40)
    assert f"manifest.json: more than {layout.MAX_MANIFEST_BYTES} bytes" in refused(bundle)


@pytest.mark.parametrize("name", ["manifest.json", "parity.json", "model.ts"])
def test_what_is_no_file_is_not_waited_for(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    assert f"{name}: not a regular file" in refused(bundle)
    (bundle / name).unlink()
    (bundle / name).mkdir()
    assert f"{name}: not a regular file" in refused(bundle)


def test_a_manifest_that_is_a_link_is_not_followed(bundle: Path, tmp_path: Path) -> None:
    (bundle / "manifest.json").rename(tmp_path / "elsewhere")
    (bundle / "manifest.json").symlink_to(tmp_path / "elsewhere")
    assert "manifest.json: not a regular file" in refused(bundle)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"training":' * 100_000,
        b'{"version": 1' + b"0" * 5000 + b"}",
        b'{"name": "\\ud800"}',
        b'{"name": "a", "name": "b"}',
        b'{"artifacts": [{"kind": "ARTIFACT_KIND_SURPRISE"}]}',
        b'{"inputSize": -1}',
        b'{"hiddenSize": 1e300}',
        b'{"training": {"testAccuracy": "much"}}',
    ],
)
@pytest.mark.parametrize("name", ["manifest.json", "parity.json"])
def test_json_made_to_harm_is_refused(bundle: Path, name: str, content: bytes) -> None:
    (bundle / name).write_bytes(content)
    if name == "parity.json":
        vouch(bundle, name)
    assert name in refused(bundle)


@pytest.mark.parametrize("text", ["x" * 3_000_000, "a\nERROR b", "\x1b[2J"])
def test_what_a_bundle_says_is_told_in_one_line(bundle: Path, text: str) -> None:
    def rename(report: dict[str, Any]) -> None:
        report["proofs"][0]["cases"][0].update(name=text, maxAbsDiff=1)

    good = (bundle / "manifest.json").read_bytes()
    edit(bundle / "parity.json", rename)
    vouch(bundle, "parity.json")
    assert refused(bundle).isprintable()
    (bundle / "manifest.json").write_bytes(good)
    edit(bundle / "manifest.json", lambda manifest: manifest["artifacts"][0].update(file=text))
    assert refused(bundle).isprintable()


@pytest.mark.parametrize("field", ["classLabels", "featureNames"])
def test_a_label_or_name_is_of_a_size_to_be_told_with_every_answer(bundle: Path, field: str) -> None:
    def name(text: str) -> Callable[[dict[str, Any]], None]:
        return lambda manifest: manifest[field].__setitem__(1, text)

    edit(bundle / "manifest.json", name("\N{GREEK SMALL LETTER ALPHA}" * (layout.MOST_TEXT_BYTES // 2)))
    read_manifest(bundle)
    edit(bundle / "manifest.json", name("x" * (layout.MOST_TEXT_BYTES + 1)))
    assert f": one of {layout.MOST_TEXT_BYTES + 1} bytes, {layout.MOST_TEXT_BYTES} at most" in refused(bundle)


@pytest.mark.parametrize("field", ["inputSize", "hiddenSize", "outputSize", "numLayers"])
def test_a_network_too_large_to_serve_is_refused(bundle: Path, field: str) -> None:
    edit(bundle / "manifest.json", lambda manifest: manifest.update({field: 2**32 - 1}))
    assert "4294967295, " in refused(bundle)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_manifests_with_any_field_of_any_value_are_read_or_refused(bundle: Path, data: st.DataObject) -> None:
    good = (bundle / "manifest.json").read_text()
    try:
        manifest = json.loads(good)
        place = manifest
        if data.draw(st.booleans()):
            place = data.draw(st.sampled_from(manifest["artifacts"]))
        place[data.draw(st.sampled_from(sorted(place)))] = data.draw(_JSON)
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        with contextlib.suppress(BundleError):
            read_manifest(bundle)
    finally:
        (bundle / "manifest.json").write_text(good)
