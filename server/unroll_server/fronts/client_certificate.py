"""Whom a caller's certificate names, by what Envoy says of it in the header x-forwarded-client-cert.

https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_conn_man/headers#x-forwarded-client-cert
"""

import re

COMMON_NAME = "x509_common_name"
ALTERNATIVE_NAME = "x509_subject_alternative_name"

_ELEMENT = re.compile(rb'(\w+)=("(?:[^"\\]|\\.)*"|[^;]*)(?:;|$)')
"""One `key=value` of the header; what is quoted may hold anything, with a backslash before quotes and backslashes."""
_ATTRIBUTE = re.compile(r"\s*([^=,+\\]+)=((?:[^,+\\]|\\.)*)(?:[,+]|$)", re.DOTALL)
"""An attribute of a distinguished name, RFC 4514; one begins where another ends."""
_ESCAPE = re.compile(rb"\\([0-9a-fA-F]{2}|.)", re.DOTALL)


def names_in(header: bytes) -> dict[str, list[bytes]]:
    """The names of the certificate, under the keys of grpcio's `auth_context`.

    Args:
        header: The header's value, made by this server's own Envoy; callers' own is dropped there.

    Returns:
        `x509_common_name`, and `x509_subject_alternative_name` with the URIs first, then DNS names; what the
        certificate has.
    """
    names: dict[str, list[bytes]] = {}
    stage = 0
    for key, value in _ELEMENT.findall(header):
        # Envoy gives subject, URIs and DNS names in this order and quotes but the subject: what looks like another
        # part behind the names is part of a name.
        order = _ORDER.get(key)
        if order is None or order < stage or (order == stage == 1):
            continue
        stage = order
        if order == 1:
            if common_name := _common_name(value):
                names[COMMON_NAME] = [common_name]
        elif value:
            names.setdefault(ALTERNATIVE_NAME, []).append(value)
    return names


_ORDER = {b"Subject": 1, b"URI": 2, b"DNS": 3}


def _common_name(subject: bytes) -> bytes | None:
    # Within the quotes stands the name itself: it has no quotes and backslashes of its own without a backslash. The
    # most specific part comes first.
    subject = subject.removeprefix(b'"').removesuffix(b'"')
    attributes = _ATTRIBUTE.findall(subject.decode("latin-1"))
    found = next((value for kind, value in attributes if kind == "CN"), None)
    return None if found is None else _ESCAPE.sub(_unescaped, found.encode("latin-1"))


def _unescaped(escape: re.Match[bytes]) -> bytes:
    return bytes.fromhex(escape[1].decode()) if len(escape[1]) == 2 else escape[1]
