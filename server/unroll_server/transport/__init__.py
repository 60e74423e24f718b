"""Transports: what carries the servicers to the wire."""
