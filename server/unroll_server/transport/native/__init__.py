"""The native transport: HTTP/2 and gRPC in C++, on the server's own event loop."""
