"""The gRPC server of Unroll: bundles, runtimes, engine, handlers."""
