"""Certificates for TLS, read from files and reloaded when the files change."""

import logging
import re
import ssl
import threading
from pathlib import Path
from typing import NamedTuple, Self

from unroll_server.config import Settings
from unroll_server.errors import StartupError
from unroll_server.transport.x509 import USABLE, certificates, is_usable

_log = logging.getLogger(__name__)

_BEGIN = re.compile(rb"^-----BEGIN (?:X509 )?CERTIFICATE-----", re.MULTILINE)


class Pem(NamedTuple):
    """Certificates and key, as PEM.

    Attributes:
        chain: The server's certificate and intermediate certificates.
        key: Private key of the certificate.
        client_ca: Authorities of the callers' certificates; None if callers need no certificate.
    """

    chain: bytes
    key: bytes
    client_ca: bytes | None


class Certificates:
    """The last valid certificates of the files. Thread-safe.

    Args:
        chain: File of the server's certificate chain.
        key: File of its private key.
        client_ca: File of the authorities of callers' certificates; None if callers need no certificate.

    Raises:
        StartupError: a file can't be read or used, or the key does not fit the certificate.
    """

    def __init__(self, chain: Path, key: Path, client_ca: Path | None) -> None:
        self._paths = (chain, key, client_ca)
        self._lock = threading.Lock()
        self._seen = self._signature()
        try:
            self._current = self._read()
        except (ValueError, OSError) as error:
            raise StartupError(_line(error)) from None

    @classmethod
    def of(cls, settings: Settings) -> Self | None:
        """Returns the certificates of the settings; None without TLS.

        Raises:
            StartupError: see the class.
        """
        if settings.tls_cert is None or settings.tls_key is None:
            return None
        return cls(settings.tls_cert, settings.tls_key, settings.tls_client_ca)

    @property
    def current(self) -> Pem:
        """The certificates to use."""
        return self._current

    @property
    def asks_callers(self) -> bool:
        """True if callers need a certificate."""
        return self._paths[2] is not None

    def renewed(self) -> Pem | None:
        """Reloads the files if they changed; returns new valid certificates. Logs invalid ones once."""
        with self._lock:
            signature = self._signature()
            if signature == self._seen:
                return None
            fresh: Pem | Exception
            try:
                fresh = self._read()
            except (ValueError, OSError) as error:
                fresh = error
            if self._signature() != signature:
                # Written while it was read: the next call reads the complete file.
                return None
            self._seen = signature
            if isinstance(fresh, Exception):
                _log.error("still using the old certificates: %s", _line(fresh))
                return None
            if fresh == self._current:
                return None
            self._current = fresh
            _log.info("using new certificates")
            return fresh

    def _signature(self) -> tuple[tuple[int, ...], ...]:
        """Returns a value that changes with the files. Follows links: secrets are often replaced by moving one."""
        return tuple(_stat(path) for path in self._paths if path)

    def _read(self) -> Pem:
        chain, key, client_ca = self._paths
        pem = Pem(chain.read_bytes(), key.read_bytes(), client_ca.read_bytes() if client_ca else None)
        _check_certificates("--tls-cert", chain, pem.chain)
        if not is_usable(pem.chain):
            raise ValueError(f"--tls-cert: {chain} is for a key that gRPC's clients can't use: not {USABLE}")
        if client_ca and pem.client_ca is not None:
            _check_certificates("--tls-client-ca", client_ca, pem.client_ca)
        try:
            # An empty password: a key that needs one is refused, without a prompt.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key, password="")
        except ssl.SSLError as error:
            if error.reason and "MISMATCH" in error.reason:
                raise ValueError(f"--tls-key: {key} is not the key of the certificate {chain}") from None
            raise ValueError(f"--tls-key: {key} has no private key that is usable without a password") from None
        return pem


def _check_certificates(option: str, path: Path, pem: bytes) -> None:
    try:
        found = len(certificates(pem))
    except ValueError:
        found = 0
    # gRPC's core skips a certificate that does not begin its line, such as one after a byte order mark.
    if not found or found != len(_BEGIN.findall(pem)):
        raise ValueError(f"{option}: {path} must be certificates in PEM, each at the beginning of a line")


def _stat(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _line(error: Exception) -> str:
    """Returns one line about an error, without content of a file."""
    if isinstance(error, OSError):
        return f"--tls-cert, --tls-key, --tls-client-ca: {error.filename}: {error.strerror}"
    return str(error)
