"""Batch inference over files, Parquet to Parquet: without a server, with one, and by a loop of PyTorch."""
