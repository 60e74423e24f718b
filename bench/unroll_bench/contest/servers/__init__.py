"""Servers that ours is compared with, each a separate process."""
