"""Renders a Helm chart with Helm's own engine, and checks what comes out against the API of Kubernetes.

Run by the Python of `.venv-deploy`, with the chart's folder as argument. Standard input has a JSON list of values, one
for each case; standard output gets a JSON object: `lint`, the messages of `helm lint`, and `cases`, each with either
`error` or `documents`, the rendered manifests.
"""

import json
import sys
from typing import Any

import helm_python as helm
import kubernetes_validate
import yaml

KUBERNETES = "1.33"
"""Version of the API."""
FOREIGN = "monitoring.coreos.com/"
"""API group of the Prometheus operator, which is not part of Kubernetes."""


def rendered(chart: helm.Chart, values: dict[str, Any]) -> dict[str, Any]:
    try:
        files = chart.render(values, name="demo", namespace="models")
    except helm.HelmError as error:
        return {"error": str(error)}
    documents = [
        document
        for name, text in sorted(files.items())
        if name.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document
    ]
    for document in documents:
        if not document["apiVersion"].startswith(FOREIGN):
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    return {"documents": documents, "notes": next(text for name, text in files.items() if name.endswith("NOTES.txt"))}


def main() -> None:
    """Renders the cases."""
    folder = sys.argv[1]
    cases = json.load(sys.stdin)
    lint = helm.lint(folder, cases[0], strict=True, quiet=True)
    with helm.Chart.load(folder) as chart:
        json.dump({"lint": lint, "cases": [rendered(chart, values) for values in cases]}, sys.stdout)


if __name__ == "__main__":
    main()
