"""The native transport: HTTP/2 and gRPC in C++, on the server's own event loop."""

try:
    from unroll_server.transport.native import _http2  # noqa: F401
except ImportError as error:
    _import_error: str | None = str(error)
else:
    _import_error = None


def unavailable_reason() -> str | None:
    """Returns why the native transport can't serve here, or None if it can."""
    if _import_error is None:
        return None
    return f"it was not compiled when unroll-server was installed ({_import_error})"
