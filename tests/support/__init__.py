"""Shared helpers of the tests: real processes, real bundles."""
