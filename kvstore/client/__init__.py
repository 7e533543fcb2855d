"""The client for inference workers: the connection, sessions that never raise for cache errors, and admin verbs."""

from kvstore.client.client import Client, connect

__all__ = ["Client", "connect"]
