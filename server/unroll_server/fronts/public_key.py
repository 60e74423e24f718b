"""What kind of key a certificate is for, and whether TLS can be spoken with it: by both fronts, and gRPC's clients."""

from unroll_server.fronts.der import certificate_fields, elements

USABLE = "RSA of 2048 bits or more, or ECDSA on P-256 or P-384"
"""The keys that can be used: OpenSSL takes others, which BoringSSL, in Envoy and in gRPC, does not."""

_RSA = bytes.fromhex("2a864886f70d010101")
_ECDSA = bytes.fromhex("2a8648ce3d0201")
_CURVES = (bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2b81040022"))
_LEAST_BITS = 2048
_KEY = 5
"""Place of the public key in a certificate."""


def is_usable(pem: bytes) -> bool:
    """Whether the key of the first certificate is one of `USABLE`.

    Args:
        pem: Certificates that OpenSSL can read.

    Raises:
        ValueError: there is no certificate.
    """
    algorithm, key = elements(certificate_fields(pem)[_KEY].content)
    kind, *parameters = elements(algorithm.content)
    if kind.content == _ECDSA:
        return parameters[0].content in _CURVES
    # A bit string begins with the number of bits that it does not use.
    return kind.content == _RSA and _modulus(key.content[1:]).bit_length() >= _LEAST_BITS


def _modulus(key: bytes) -> int:
    (numbers,) = elements(key)
    modulus, _ = elements(numbers.content)
    return int.from_bytes(modulus.content, "big")
