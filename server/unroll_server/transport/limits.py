"""Limits of connections that are not settings."""

HANDSHAKE = 20.0
"""Seconds within which a new connection must speak HTTP/2, and a client must answer a ping."""
SHORTEST_PINGS = 5.0
"""Least seconds between two pings of a client; one that pings more often gets GOAWAY, ENHANCE_YOUR_CALM."""
METADATA = 16 * 1024
"""Most bytes of the metadata of a call; beyond it the call ends with RESOURCE_EXHAUSTED."""
