"""What runs a model: one file a library, the only files that import it."""
