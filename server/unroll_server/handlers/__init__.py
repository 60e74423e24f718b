"""The gRPC services, a file each: decode, engine, encode."""
