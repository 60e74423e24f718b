"""The page: a recurrent network that a server runs, shown step by step.

`routes` returns its files, its HTTP API and its WebSocket. Values come from real `Unroll` calls; arithmetic of weights
is numpy's, on the bundle that the server reports.
"""

from unroll_web.page.routes import routes

__all__ = ["routes"]
