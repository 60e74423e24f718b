"""Envoy's filter that refuses calls; apart from gate.py, since who starts Envoy needs no gRPC."""

from importlib.resources import files
from pathlib import Path
from typing import Any

NUMBERS = 4096
"""Bytes of numbers at the beginning of the file that the filter and the worker share."""


def http_filter(path: Path, access_log: str = "") -> dict[str, Any]:
    """Envoy's filter, as its configuration has it.

    Args:
        path: The file of the `gate.Gate`, which has to be there when the first call comes.
        access_log: "text" or "json" for a line a refused call, as calls.py has it of those that come through.
    """
    code = files(__package__).joinpath("gate.lua").read_text()
    # A long string: whatever the path holds is no Lua.
    source = f"local gate_path, gate_numbers = [=[{path}]=], {NUMBERS}\nlocal gate_log = '{access_log}'\n{code}"
    kind = "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua"
    return {
        "name": "envoy.filters.http.lua",
        "typed_config": {"@type": kind, "default_source_code": {"inline_string": source}},
    }
