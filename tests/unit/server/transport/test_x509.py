"""Certificates that TLS can use."""

import datetime
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from support.certificates import Authority

from unroll_server.transport.x509 import certificates, is_usable


def signed_by_itself(key: CertificateIssuerPrivateKeyTypes) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "n" * 64)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    ("key", "usable"),
    [
        (rsa.generate_private_key(65537, 2048), True),
        (rsa.generate_private_key(65537, 3072), True),
        (rsa.generate_private_key(65537, 1024), False),  # noqa: S505 - that is why
        (ec.generate_private_key(ec.SECP256R1()), True),
        (ec.generate_private_key(ec.SECP384R1()), True),
        (ec.generate_private_key(ec.SECP521R1()), False),
        (ec.generate_private_key(ec.SECP256K1()), False),
        (ed25519.Ed25519PrivateKey.generate(), False),
        (dsa.generate_private_key(2048), False),
    ],
    ids=["rsa2048", "rsa3072", "rsa1024", "p256", "p384", "p521", "secp256k1", "ed25519", "dsa"],
)
def test_keys_are_usable_that_every_client_of_grpc_knows(key: CertificateIssuerPrivateKeyTypes, usable: bool) -> None:
    pem = signed_by_itself(key)
    assert is_usable(pem) is usable
    # The first is the server's own.
    other = Authority().pem if not usable else signed_by_itself(ed25519.Ed25519PrivateKey.generate())
    assert is_usable(b"caf\xe9\r\n" + pem.replace(b"\n", b"\r\n") + other) is usable
    with pytest.raises(ValueError, match="PEM"):
        is_usable(b"-----BEGIN PRIVATE KEY-----")


def test_every_certificate_is_found_and_read() -> None:
    first, second = (ssl.DER_cert_to_PEM_cert(der) for der in certificates(Authority().pem + Authority().pem))
    both = f"text\n{first}more\n{second}".encode()
    assert [ssl.DER_cert_to_PEM_cert(der) for der in certificates(both)] == [first, second]
    lines = second.splitlines()
    for damaged in ("\n".join([*lines[:3], *lines[4:]]), "\n".join([lines[0], lines[-1]])):
        with pytest.raises(ValueError, match=r"can't be read|Empty"):
            certificates((first + damaged).encode())
