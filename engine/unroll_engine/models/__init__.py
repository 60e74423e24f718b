"""Models: their specification, how they are loaded, and measurements of them on this machine."""
