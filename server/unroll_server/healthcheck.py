"""The probe of container health checks: `python -m unroll_server.healthcheck HOST:PORT` or `unix:/PATH`."""

import os
import socket
import ssl
import tomllib
from pathlib import Path
from typing import NoReturn

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from unroll_proto import cli

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("address", metavar="ADDRESS")
@click.option("--service", default="", help="Service to ask for; by default the whole server.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=3.0, help="Seconds to wait.")
@click.option(
    "--tls-ca",
    type=_FILE,
    envvar=["UNROLL_HEALTHCHECK_CA", "UNROLL_TLS_CERT"],
    help="PEM of the server's certificate or of its authorities: speaks TLS, with any server name.",
)
@click.option(
    "--tls-cert",
    type=_FILE,
    envvar=["UNROLL_HEALTHCHECK_CERT", "UNROLL_TLS_CERT"],
    help="Certificate chain for a server that asks for one, PEM.",
)
@click.option(
    "--tls-key",
    type=_FILE,
    envvar=["UNROLL_HEALTHCHECK_KEY", "UNROLL_TLS_KEY"],
    help="Private key of the certificate, PEM.",
)
def command(
    address: str, service: str, timeout: float, tls_ca: Path | None, tls_cert: Path | None, tls_key: Path | None
) -> None:
    """Asks the server at ADDRESS, HOST:PORT or unix:/PATH, for its health; exit code 0 only if it is SERVING.

    In the environment of the server it speaks TLS by itself, with UNROLL_TLS_CERT and UNROLL_TLS_KEY, or with tls_cert
    and tls_key of the file UNROLL_CONFIG.
    """
    # A proxy must not be used for a server on this machine.
    options: list[tuple[str, str | int]] = [("grpc.enable_http_proxy", 0)]
    try:
        in_file = _paths_in_file()
        tls_ca = tls_ca or in_file.get("tls_cert")
        tls_cert, tls_key = tls_cert or in_file.get("tls_cert"), tls_key or in_file.get("tls_key")
        if tls_ca is None:
            channel = grpc.insecure_channel(address, options)
        else:
            options.append(("grpc.ssl_target_name_override", _name_of(address, tls_ca, timeout)))
            pair = (tls_key.read_bytes(), tls_cert.read_bytes()) if tls_key and tls_cert else (None, None)
            channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(tls_ca.read_bytes(), *pair), options)
        with channel:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout)
    except grpc.RpcError as error:
        details = " ".join((error.details() or "").split())
        raise click.ClickException(f"{address}: {error.code().name}: {details}") from None
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{address}: {error}") from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise click.ClickException(f"{address}: {status}")
    click.echo(f"{address}: {status}")


def _paths_in_file() -> dict[str, Path]:
    """Returns the paths of certificate and key in the file UNROLL_CONFIG.

    A probe runs every few seconds; loading the server's settings would take longer than the probe.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not TOML.
    """
    file = os.environ.get("UNROLL_CONFIG")
    settings = tomllib.loads(Path(file).read_text("utf-8")) if file else {}
    return {name: Path(settings[name]) for name in ("tls_cert", "tls_key") if name in settings}


def _name_of(address: str, tls_ca: Path, timeout: float) -> str:
    """Returns a name in the server's certificate, since few certificates name the address that a local probe uses.

    Raises:
        OSError: no server speaks TLS there, or its certificate does not descend from `tls_ca`.
        ValueError: the certificate has no name.
    """
    context = ssl.create_default_context(cafile=tls_ca)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.set_alpn_protocols(["h2"])
    with _connected(address, timeout) as plain, context.wrap_socket(plain) as secure:
        certificate = secure.getpeercert() or {}
    names: tuple[tuple[str, str], ...] = certificate.get("subjectAltName", ())  # type: ignore[assignment]
    for kind, name in names:
        if kind in ("DNS", "IP Address"):
            return name.replace("*", "health", 1)
    raise ValueError("its certificate names no host")


def _connected(address: str, timeout: float) -> socket.socket:
    if not address.startswith("unix:"):
        host, _, port = address.rpartition(":")
        return socket.create_connection((host.strip("[]"), int(port)), timeout)
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(timeout)
        connection.connect(address.removeprefix("unix:"))
    except BaseException:
        connection.close()
        raise
    return connection


def main() -> NoReturn:
    """Entry point of `python -m unroll_server.healthcheck`."""
    cli.run("healthcheck", command, "unroll-server")


if __name__ == "__main__":
    main()
