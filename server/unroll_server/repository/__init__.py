"""The model repository: a folder of bundles, the versions loaded from it, and their lives."""
