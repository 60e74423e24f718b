"""Load generator for gRPC servers (`load`), the command `unroll-bench`, and this project's benchmark (`contest`)."""
