"""Handlers of every service."""
