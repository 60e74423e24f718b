"""Whom a caller's certificate names, by the certificate itself, which Envoy gives in x-forwarded-client-cert.

https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_conn_man/headers#x-forwarded-client-cert

Envoy can also tell the names. But it tells them as they are, between semicolons: a name with one could not be told from
two names.
"""

import ipaddress
from collections.abc import Iterator
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from unroll_server.fronts.der import Element, certificate_fields, elements

COMMON_NAME = "x509_common_name"
ALTERNATIVE_NAME = "x509_subject_alternative_name"

_SUBJECT = 4
"""Place of the subject in a certificate."""
_EXTENSIONS = 0xA3
_COMMON_NAME = bytes.fromhex("550403")
_ALTERNATIVE_NAMES = bytes.fromhex("551d11")
_EMAIL, _DNS, _URI, _ADDRESS = 0x81, 0x82, 0x86, 0x87
_ENCODINGS = {0x14: "latin-1", 0x1C: "utf-32-be", 0x1E: "utf-16-be"}
"""Of strings by their tags; all others are UTF-8, or ASCII."""


@lru_cache(1024)
def names_in(header: bytes) -> dict[str, list[bytes]]:
    """The names of the certificate, under the keys of grpcio's `auth_context`; shared, and not to be changed.

    Args:
        header: The header's value, made by this server's own Envoy of a certificate that it has verified; callers' own
            is dropped there.

    Returns:
        `x509_common_name`, the first, and `x509_subject_alternative_name`, in the certificate's order; those it has.
    """
    names: dict[str, list[bytes]] = {}
    fields = certificate_fields(unquote_to_bytes(header.rpartition(b'Cert="')[2].partition(b'"')[0]))
    common = [_text(value) for value in _common_names(fields[_SUBJECT])]
    if common:
        names[COMMON_NAME] = common[:1]
    alternative = [name for field in fields if field.tag == _EXTENSIONS for name in _alternative_names(field)]
    if alternative:
        names[ALTERNATIVE_NAME] = alternative
    return names


def _common_names(subject: Element) -> Iterator[Element]:
    for part in elements(subject.content):
        for attribute in elements(part.content):
            kind, value = elements(attribute.content)
            if kind.content == _COMMON_NAME:
                yield value


def _text(value: Element) -> bytes:
    encoding = _ENCODINGS.get(value.tag)
    return value.content.decode(encoding, "replace").encode() if encoding else value.content


def _alternative_names(field: Element) -> Iterator[bytes]:
    (extensions,) = elements(field.content)
    for extension in elements(extensions.content):
        kind, *_, value = elements(extension.content)
        if kind.content != _ALTERNATIVE_NAMES:
            continue
        (names,) = elements(value.content)
        for name in elements(names.content):
            if name.tag in (_EMAIL, _DNS, _URI):
                yield name.content
            elif name.tag == _ADDRESS:
                yield str(ipaddress.ip_address(name.content)).encode()
