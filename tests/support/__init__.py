"""What several tests stand on: real processes, real bundles."""
