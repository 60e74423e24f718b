"""Contracts of Unroll: the gRPC wire (`v1`), the bundle on disk, sequence files, command-line conventions."""
