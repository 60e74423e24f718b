"""Whom a caller's certificate names, by the certificate itself, which Envoy gives in x-forwarded-client-cert.

https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_conn_man/headers#x-forwarded-client-cert

Envoy can also tell the names. But it tells them as they are, between semicolons: a name with one could not be told from
two names.
"""

from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from cryptography import x509

COMMON_NAME = "x509_common_name"
ALTERNATIVE_NAME = "x509_subject_alternative_name"


@lru_cache(1024)
def names_in(header: bytes) -> dict[str, list[bytes]]:
    """The names of the certificate, under the keys of grpcio's `auth_context`; shared, and not to be changed.

    Args:
        header: The header's value, made by this server's own Envoy of a certificate that it has verified; callers' own
            is dropped there.

    Returns:
        `x509_common_name`, the first, and `x509_subject_alternative_name`, in the certificate's order; those it has.
    """
    pem = unquote_to_bytes(header.rpartition(b'Cert="')[2].partition(b'"')[0])
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        common = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        alternative = [name for each in _alternative_names(certificate) if (name := _text(each)) is not None]
    except (ValueError, x509.DuplicateExtension):
        # BoringSSL takes some that break the rules. They name nobody.
        return {}
    names: dict[str, list[bytes]] = {}
    if common:
        value = common[0].value
        names[COMMON_NAME] = [value.encode() if isinstance(value, str) else value]
    if alternative:
        names[ALTERNATIVE_NAME] = alternative
    return names


def _alternative_names(certificate: x509.Certificate) -> Iterable[x509.GeneralName]:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()


def _text(name: x509.GeneralName) -> bytes | None:
    if isinstance(name, (x509.RFC822Name, x509.DNSName, x509.UniformResourceIdentifier, x509.IPAddress)):
        return str(name.value).encode()
    return None
