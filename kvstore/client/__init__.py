"""What inference workers use: the connection, the session that never raises for cache trouble, the admin verbs."""

from kvstore.client.client import Client, connect

__all__ = ["Client", "connect"]
