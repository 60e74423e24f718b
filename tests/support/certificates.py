"""Certificates made by tests, and channels with TLS."""

import datetime
import hashlib
import socket
import ssl
from pathlib import Path

import grpc
import grpc.aio
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519


class Authority:
    """A certificate authority.

    Attributes:
        pem: Its certificate.
    """

    def __init__(self) -> None:
        self._ca = trustme.CA()
        self.pem: bytes = self._ca.cert_pem.bytes()

    def issue(self, *names: str, common_name: str | None = None) -> tuple[bytes, bytes]:
        """Returns the chain of a new certificate, and its private key."""
        issued = self._ca.issue_cert(*names, common_name=common_name)
        return b"".join(blob.bytes() for blob in issued.cert_chain_pems), issued.private_key_pem.bytes()


def unusable() -> tuple[bytes, bytes]:
    """Returns a certificate and key that OpenSSL accepts but gRPC's clients do not."""
    key = ed25519.Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, None)
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    return certificate.public_bytes(pem), key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)


class Files:
    """Certificate files of a server.

    Args:
        folder: Folder of the files.
        authority: Issues the server's certificate.
        callers: Issues the callers' certificates; None if they need none.
    """

    def __init__(self, folder: Path, authority: Authority, callers: Authority | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self.chain, self.key, self.client_ca = folder / "cert.pem", folder / "key.pem", folder / "clients.pem"
        self._callers = callers
        self.renew(authority)
        if callers:
            self.client_ca.write_bytes(callers.pem)

    @property
    def options(self) -> list[str]:
        """Options of `unroll-serve`."""
        options = ["--tls-cert", str(self.chain), "--tls-key", str(self.key)]
        return [*options, "--tls-client-ca", str(self.client_ca)] if self._callers else options

    def renew(self, authority: Authority) -> None:
        """Replaces the certificate."""
        chain, key = authority.issue("localhost", "127.0.0.1")
        replace(self.chain, chain)
        replace(self.key, key)


def replace(path: Path, content: bytes) -> None:
    """Replaces a file by a rename, as certificates are renewed."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.replace(path)


def channel(address: str, authority: Authority, caller: tuple[bytes, bytes] | None = None) -> grpc.aio.Channel:
    """Opens a channel with its own connection to a server with a certificate of `authority`."""
    chain, key = caller or (None, None)
    credentials = grpc.ssl_channel_credentials(authority.pem, key, chain)
    return grpc.aio.secure_channel(address, credentials, [("grpc.use_local_subchannel_pool", 1)])


def shown_by(address: str) -> str:
    """Returns the fingerprint of the server's current certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as plain, context.wrap_socket(plain) as secure:
        shown = secure.getpeercert(binary_form=True)
    assert shown is not None
    return hashlib.sha256(shown).hexdigest()


def fingerprint(path: Path) -> str:
    """Returns the fingerprint of the first certificate in a file."""
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    first = path.read_text("latin-1").split(end)[0] + end
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(first[first.index(begin) :])).hexdigest()
