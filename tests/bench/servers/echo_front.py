"""The echo as the ASGI application that an Envoy loads: our ASGI front, no interceptor, no other service."""

from bench.servers.echo import EchoHandler
from bench.servers.serving import MAX_MESSAGE_BYTES
from unroll_server.fronts.asgi import AsgiFront

app = AsgiFront([], MAX_MESSAGE_BYTES)
app.registry.add_generic_rpc_handlers((EchoHandler(),))
