"""The engine of Unroll: loads model bundles and runs sequences on them, without a server."""
