"""Handlers of all services."""
