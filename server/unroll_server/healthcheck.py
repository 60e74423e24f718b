"""Asks a server whether it serves: `python -m unroll_server.healthcheck HOST:PORT`, for container health checks."""

from typing import NoReturn

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from unroll_proto import cli


@click.command()
@click.argument("address", metavar="HOST:PORT")
@click.option("--service", default="", help="Service to ask for; the server as a whole where absent.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=3.0, help="Seconds to wait.")
def command(address: str, service: str, timeout: float) -> None:
    """Asks grpc.health.v1.Health of the server at HOST:PORT; exit code 0 only where it says SERVING."""
    try:
        # A proxy for the way out of the network must not stand before a server beside us.
        with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout)
    except grpc.RpcError as error:
        details = " ".join((error.details() or "").split())
        raise click.ClickException(f"{address}: {error.code().name}: {details}") from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise click.ClickException(f"{address}: {status}")
    click.echo(f"{address}: {status}")


def main() -> NoReturn:
    """Entry point of `python -m unroll_server.healthcheck`."""
    cli.run("healthcheck", command)


if __name__ == "__main__":
    main()
