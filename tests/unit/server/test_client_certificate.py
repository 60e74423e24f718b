"""Whom a certificate names, under the names that grpcio has for it."""

import datetime
import ipaddress
from collections.abc import Sequence
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.name import _ASN1Type

from unroll_server.fronts.client_certificate import ALTERNATIVE_NAME, COMMON_NAME, names_in

KEY = ec.generate_private_key(ec.SECP256R1())
DNS, URI = x509.DNSName, x509.UniformResourceIdentifier
OTHER = x509.RegisteredID(x509.ObjectIdentifier("1.2.3"))
UTF8, BMP = _ASN1Type.UTF8String, _ASN1Type.BMPString


def common(value: str, kind: _ASN1Type = UTF8) -> x509.NameAttribute[str]:
    return x509.NameAttribute(x509.NameOID.COMMON_NAME, value, kind)


def header(subject: Sequence[x509.NameAttribute[str]], names: Sequence[x509.GeneralName]) -> bytes:
    """What Envoy says of a certificate with these names."""
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder(x509.Name([]), x509.Name(subject), KEY.public_key(), 1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    pem = builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    return f'Hash=ab12;Cert="{quote(pem.decode(), safe="")}"'.encode()


@pytest.mark.parametrize(
    ("subject", "names", "common_name", "alternative"),
    [
        ([common("alice")], [], [b"alice"], None),
        ([common("alice"), common("bob")], [], [b"alice"], None),
        ([common('a"b, c\\\u00fc;URI=evil')], [], ['a"b, c\\\u00fc;URI=evil'.encode()], None),
        ([common("J\u00fcrgen", BMP)], [], ["J\u00fcrgen".encode()], None),
        ([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "CN=evil")], [DNS("a.test")], None, [b"a.test"]),
        ([], [URI("urn:admin;of;x"), DNS("b.test")], None, [b"urn:admin;of;x", b"b.test"]),
        ([], [DNS("b.test;DNS=c"), URI('spiffe://a/b"')], None, [b"b.test;DNS=c", b'spiffe://a/b"']),
        (
            [common("c")],
            [x509.RFC822Name("a@b.test"), x509.IPAddress(ipaddress.ip_address("::1")), OTHER],
            [b"c"],
            [b"a@b.test", b"::1"],
        ),
        ([], [], None, None),
    ],
)  # fmt: skip
def test_names(
    subject: Sequence[x509.NameAttribute[str]],
    names: Sequence[x509.GeneralName],
    common_name: list[bytes] | None,
    alternative: list[bytes] | None,
) -> None:
    found = names_in(header(subject, names))
    assert found.get(COMMON_NAME) == common_name
    assert found.get(ALTERNATIVE_NAME) == alternative
