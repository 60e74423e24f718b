"""Behaviour around every handler."""
