"""Kinds of certificate keys that gRPC can speak TLS with."""

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa

USABLE = "RSA of 2048 bits or more, or ECDSA on P-256 or P-384"
"""The keys that can be used: OpenSSL takes others, which BoringSSL, in gRPC, does not."""

_CURVES = (ec.SECP256R1, ec.SECP384R1)
_LEAST_BITS = 2048


def is_usable(pem: bytes) -> bool:
    """Whether the key of the first certificate is one of `USABLE`.

    Args:
        pem: Certificates, and what text there is between them.

    Raises:
        ValueError: there is no certificate.
    """
    try:
        key = x509.load_pem_x509_certificate(pem).public_key()
    except UnsupportedAlgorithm:
        return False
    if isinstance(key, ec.EllipticCurvePublicKey):
        return isinstance(key.curve, _CURVES)
    return isinstance(key, rsa.RSAPublicKey) and key.key_size >= _LEAST_BITS
