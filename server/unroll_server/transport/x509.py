"""Properties of certificates (RFC 5280) that Python's `ssl` does not show: all of a PEM file, and kinds of keys."""

import re
import ssl
from binascii import a2b_base64

USABLE = "RSA of 2048 bits or more, or ECDSA on P-256 or P-384"
"""Usable keys: OpenSSL accepts others, but gRPC's BoringSSL does not."""

_BLOCK = re.compile(rb"-----BEGIN ((?:X509 )?CERTIFICATE)-----(.*?)-----END \1-----", re.DOTALL)
# Object identifiers in DER: rsaEncryption, id-ecPublicKey, and the curves secp256r1 and secp384r1.
_RSA = bytes.fromhex("2a864886f70d010101")
_EC = bytes.fromhex("2a8648ce3d0201")
_CURVES = (bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2b81040022"))
_LEAST_BITS = 2048
_VERSION_TAG = 0xA0


def certificates(pem: bytes) -> list[bytes]:
    """Returns the DER of every certificate.

    Args:
        pem: Certificates, with any text between them.

    Raises:
        ValueError: there is none in PEM, or OpenSSL can't read one.
    """
    found = [a2b_base64(block[2]) for block in _BLOCK.finditer(pem)]
    try:
        for der in found:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=der)
    except ssl.SSLError as error:
        raise ValueError(f"a certificate can't be read: {error.reason}") from None
    if not found:
        raise ValueError("no certificate in PEM")
    return found


def is_usable(pem: bytes) -> bool:
    """Returns True if the key of the first certificate is one of `USABLE`.

    Raises:
        ValueError: there is no certificate; see `certificates`.
    """
    fields = _elements(_elements(_elements(certificates(pem)[0])[0][1])[0][1])
    # [version], serial number, signature, issuer, validity, subject, subjectPublicKeyInfo.
    _, key_info = fields[6 if fields[0][0] == _VERSION_TAG else 5]
    (_, algorithm), (_, bits) = _elements(key_info)
    (_, kind), *parameters = _elements(algorithm)
    if kind == _EC:
        return parameters[0][1] in _CURVES
    if kind != _RSA:
        return False
    # A bit string begins with the number of bits to leave out; the key is a sequence of modulus and exponent.
    (_, modulus), _ = _elements(_elements(bits[1:])[0][1])
    return int.from_bytes(modulus, "big").bit_length() >= _LEAST_BITS


def _elements(der: bytes) -> list[tuple[int, bytes]]:
    """Yields tag and content of each element of DER that OpenSSL has accepted."""
    found = []
    at = 0
    while at < len(der):
        tag, size = der[at], der[at + 1]
        at += 2
        if size & 0x80:  # the size of the size
            digits = size & 0x7F
            size = int.from_bytes(der[at : at + digits], "big")
            at += digits
        found.append((tag, der[at : at + size]))
        at += size
    return found
