"""Connecting to a server by its address."""

import asyncio
import ssl
from collections.abc import Callable

from unroll_bench.load.h2 import Connection

CONNECT_TIMEOUT = 10.0
"""Seconds after which a silent server counts as unreachable."""


async def connect(
    address: str,
    on_unusable: Callable[[Connection], None],
    *,
    tls: ssl.SSLContext | None = None,
) -> Connection:
    """Connects to `address` and waits for the server's HTTP/2 settings.

    Args:
        address: HOST:PORT, [IPV6]:PORT, or unix:PATH.
        on_unusable: See `Connection`.
        tls: Context for TLS; it must offer "h2" (`set_alpn_protocols`). None for plaintext.

    Raises:
        OSError: there is no such server, it does not speak HTTP/2, or it does not answer within 10 s.
        ValueError: `address` is not an address.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            if address.startswith("unix:"):
                _, connection = await loop.create_unix_connection(
                    lambda: Connection(on_unusable), address.removeprefix("unix:")
                )
            else:
                host, port = split_address(address)
                _, connection = await loop.create_connection(lambda: Connection(on_unusable), host, port, ssl=tls)
            try:
                await connection.ready()
            except BaseException:
                await connection.close()
                raise
    except TimeoutError:
        raise TimeoutError(f"no answer from {address} within {CONNECT_TIMEOUT:g} s") from None
    return connection


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port of HOST:PORT or [IPV6]:PORT.

    Raises:
        ValueError: it is neither.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ValueError(f"{address}: HOST:PORT expected")
    return host, int(port)
