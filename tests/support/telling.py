"""A service that tells its caller what it knows of it, on either front; as a module, the application for Envoy."""

import json
from typing import Any

import grpc

from unroll_server.fronts.asgi import AsgiFront

METHOD = "/telling.Telling/Who"


async def _who(request: bytes, context: Any) -> bytes:
    known = {
        "auth_context": {
            key: [value.decode("utf-8", "replace") for value in values]
            for key, values in context.auth_context().items()
            if key.startswith("x509_") and not key.endswith("_cert") and "pem" not in key
        },
        "metadata": [key for key, _ in context.invocation_metadata()],
    }
    return json.dumps(known).encode()


def add_to(registry: Any) -> None:
    """Registers the service with a front."""
    handler: Any = grpc.unary_unary_rpc_method_handler(_who)
    registry.add_registered_method_handlers("telling.Telling", {"Who": handler})


class Application:
    """The ASGI application."""

    def __init__(self) -> None:
        self._front = AsgiFront([], 1000)
        add_to(self._front.registry)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI 3."""
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await self._front(scope, receive, send)


app = Application()
