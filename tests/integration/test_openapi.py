"""The description of the REST API: valid, complete, and true of a real web process."""

import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from support.processes import WebProcess, run
from support.web import ask

# Whatever fits the schema need not fit the model: another number of features is refused, as documented.
UNCHECKED = "positive_data_acceptance"


@pytest.fixture(scope="module")
def api(web: WebProcess) -> dict[str, Any]:
    found: dict[str, Any] = ask(web.address, "/openapi.json").json
    return found


def test_every_reference_and_schema_is_valid(api: dict[str, Any]) -> None:
    assert api["openapi"].startswith("3.1.")
    references = set(re.findall(r"'\$ref': '#/components/(\w+)/(\w+)'", str(api)))
    assert references
    assert all(name in api["components"][kind] for kind, name in references)
    for schema in api["components"]["schemas"].values():
        jsonschema_rs.Draft202012Validator(schema | {"components": api["components"]})
    names = [operation["operationId"] for methods in api["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names)) >= 20


def test_no_request_breaks_it(web: WebProcess, tmp_path: Path) -> None:
    command = ["schemathesis", "run", f"{web.address}/openapi.json", "--max-examples", "6", "--seed", "1"]
    command += ["--exclude-checks", UNCHECKED, "--phases", "coverage,fuzzing", "--no-color", "--continue-on-failure"]
    command += ["--suppress-health-check", "all", "--warnings", "off", "--generation-database", "none"]
    # Those on one version have the handlers of those without.
    command += ["--exclude-operation-id-regex", "_version$"]
    done = run(*command, check=False)
    assert done.returncode == 0, done.stdout + done.stderr + web.log[-5000:]
    assert "Traceback" not in web.log


def test_the_page_to_try_it_is_the_process_s_own(web: WebProcess) -> None:
    page = ask(web.address, "/api")
    assert (page.status, page.headers.get_content_type()) == (200, "text/html")
    text = page.data.decode()
    assert "://" not in text
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=", text)
    for path, kind in (("/api.js", "text/javascript"), ("/api.css", "text/css")):
        assert f'"{path}"' in text
        answer = ask(web.address, path)
        assert (answer.status, answer.headers.get_content_type()) == (200, kind)
        assert b"://" not in answer.data
