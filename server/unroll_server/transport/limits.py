"""Limits of a connection that are not settings."""

HANDSHAKE = 20.0
"""Seconds that a new connection has until HTTP/2 is spoken on it, and that a ping may go unanswered."""
SHORTEST_PINGS = 5.0
"""Seconds between two pings of a client; one that pings more often is told GOAWAY, ENHANCE_YOUR_CALM."""
METADATA = 16 * 1024
"""Bytes of the metadata of a call; past it the call ends with RESOURCE_EXHAUSTED."""
