"""Choice of the transport, by `--transport`."""

from unroll_server.config import Settings
from unroll_server.errors import StartupError
from unroll_server.transport import Transport, native
from unroll_server.transport.grpcio import GrpcioTransport
from unroll_server.transport.registry import Registry
from unroll_server.transport.tls import Certificates


def make_transport(settings: Settings, registry: Registry, share_port: bool) -> Transport:
    """Returns the transport that serves the methods of a registry on `--listen`.

    Args:
        settings: The server's settings.
        registry: The methods.
        share_port: True if other processes listen on the same port.

    Raises:
        StartupError: a certificate is bad, or the native transport was chosen and is not compiled.
    """
    name, reason = settings.transport, native.unavailable_reason()
    if name == "auto":
        name = "grpcio" if reason else "native"
    elif name == "native" and reason:
        raise StartupError(f"--transport native: {reason}")
    arguments = (
        settings.listen_address,
        registry,
        settings.max_message_bytes,
        share_port,
        settings.connections,
        Certificates.of(settings),
    )
    if name == "grpcio":
        return GrpcioTransport(*arguments)
    from unroll_server.transport.native.transport import NativeTransport

    return NativeTransport(*arguments)
