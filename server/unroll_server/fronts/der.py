"""Values in DER, the form of certificates: https://www.itu.int/rec/T-REC-X.690."""

import base64
import re
from collections.abc import Iterator
from typing import NamedTuple

_FIRST = re.compile(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----(.+?)-----END ", re.DOTALL)
_VERSION = 0xA0


class Element(NamedTuple):
    """A value: its tag, and what it holds."""

    tag: int
    content: bytes


def elements(data: bytes) -> Iterator[Element]:
    """The values that stand one after the other."""
    at = 0
    while at < len(data):
        tag, size = data[at], data[at + 1]
        at += 2
        if size & 0x80:
            digits = size & 0x7F
            size = int.from_bytes(data[at : at + digits], "big")
            at += digits
        yield Element(tag, data[at : at + size])
        at += size


def certificate_fields(pem: bytes) -> list[Element]:
    """The fields of the first certificate, behind its version: RFC 5280, section 4.1.

    Args:
        pem: Certificates that a library of TLS has read.

    Raises:
        ValueError: there is none.
    """
    first = _FIRST.search(pem)
    if first is None:
        raise ValueError("no certificate")
    (certificate, *_) = elements(base64.b64decode(first[1]))
    (signed, *_) = elements(certificate.content)
    return [field for field in elements(signed.content) if field.tag != _VERSION]
