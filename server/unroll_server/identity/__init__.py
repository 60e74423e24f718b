"""Identities of callers: their tokens and their quotas."""
