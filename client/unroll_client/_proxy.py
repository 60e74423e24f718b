"""The proxy that gRPC takes from the environment, named in errors of calls without an answer."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from urllib.parse import urlsplit

from unroll_client._errors import DeadlineExceeded, Unavailable, UnrollError

# The variables that gRPC reads; the first one that is set wins.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")


def explained(error: UnrollError, targets: Iterable[str]) -> UnrollError:
    """Adds to an error without an answer which proxy the calls go through, if there is one.

    Args:
        error: Error of a call.
        targets: Targets of the client.
    """
    if not isinstance(error, Unavailable | DeadlineExceeded) or error.reason or not (hint := _hint(targets)):
        return error
    found = copy.copy(error)
    found.message = f"{error.message}; {hint}"
    found.args = (found.message, *error.args[1:])
    return found


def _hint(targets: Iterable[str]) -> str:
    variable = next((name for name in _PROXIES if os.environ.get(name)), None)
    hosts = [_host(target) for target in targets if not target.startswith(("unix", "vsock"))]
    if variable is None or all(map(_is_excepted, hosts)):
        return ""
    # Without user and password.
    proxy = urlsplit(os.environ[variable]).netloc.rpartition("@")[2] or "?"
    return f"calls go by the proxy {proxy} ({variable} in the environment): list the host in no_proxy to go without"


def _host(target: str) -> str:
    address = target.rpartition("/")[2]
    return address.rpartition(":")[0].strip("[]") or address


def _is_excepted(host: str) -> bool:
    listed = next((value for name in _EXCEPTIONS if (value := os.environ.get(name)) is not None), "")
    return any(host.lower().endswith(entry.strip().lower()) for entry in listed.split(",") if entry.strip())
