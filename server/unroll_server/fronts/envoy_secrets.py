"""The certificates for Envoy: files from which it takes them anew whenever one is moved there (SDS).

https://www.envoyproxy.io/docs/envoy/latest/configuration/security/secret
"""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

from unroll_server.fronts.certificates import Certificates, Pem
from unroll_server.fronts.limits import HANDSHAKE

_log = logging.getLogger(__name__)

LOOK = 1.0
"""Seconds between two looks at the files."""
_TYPES = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"


class Secrets:
    """What Envoys read, for as long as somebody awaits `keep`.

    Args:
        certificates: The certificates.
        folder: Where the files are made: for this user alone, since one holds the private key.
    """

    def __init__(self, certificates: Certificates, folder: Path) -> None:
        self._certificates = certificates
        self._server = folder / "server.json"
        self._callers = folder / "callers.json"
        self._write(certificates.current)

    async def keep(self) -> None:
        """Writes the files again when the certificates change, until cancelled."""
        written = self._certificates.current
        while True:
            await asyncio.sleep(LOOK)
            await asyncio.to_thread(self._certificates.renewed)
            if (current := self._certificates.current) is not written:
                try:
                    self._write(current)
                except OSError as error:
                    _log.error("the old certificates stay: %s: %s", error.filename, error.strerror)
                else:
                    written = current

    def secure(self, filter_chain: dict[str, Any], caller_manager: dict[str, Any]) -> None:
        """Makes a filter chain speak TLS, and its HTTP connection manager tell who calls."""
        context: dict[str, Any] = {
            "alpn_protocols": ["h2"],
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
            "tls_certificate_sds_secret_configs": [_from_file("server", self._server)],
        }
        socket: dict[str, Any] = {"@type": f"{_TYPES}.DownstreamTlsContext", "common_tls_context": context}
        if self._certificates.asks_callers:
            context["validation_context_sds_secret_config"] = _from_file("callers", self._callers)
            socket["require_client_certificate"] = True
            caller_manager["forward_client_cert_details"] = "SANITIZE_SET"
            caller_manager["set_current_client_cert_details"] = {"cert": True}
        filter_chain["transport_socket"] = {"name": "envoy.transport_sockets.tls", "typed_config": socket}
        filter_chain["transport_socket_connect_timeout"] = f"{HANDSHAKE:g}s"

    def _write(self, pem: Pem) -> None:
        certificate = {"certificate_chain": _inline(pem.chain), "private_key": _inline(pem.key)}
        _move_there(self._server, {"name": "server", "tls_certificate": certificate})
        if pem.client_ca is not None:
            _move_there(
                self._callers, {"name": "callers", "validation_context": {"trusted_ca": _inline(pem.client_ca)}}
            )


def _from_file(name: str, path: Path) -> dict[str, Any]:
    source = {"path_config_source": {"path": str(path)}, "resource_api_version": "V3"}
    return {"name": name, "sds_config": source}


def _inline(pem: bytes) -> dict[str, str]:
    # Between certificates there may be text, in any encoding.
    return {"inline_string": pem.decode("ascii", "replace")}


def _move_there(path: Path, secret: dict[str, Any]) -> None:
    """Makes or replaces a file that only this user reads; Envoy looks at it when something is moved to its name."""
    fresh = path.with_suffix(".new")
    fresh.touch(0o600)
    fresh.write_text(json.dumps({"resources": [{"@type": f"{_TYPES}.Secret", **secret}]}))
    fresh.replace(path)
