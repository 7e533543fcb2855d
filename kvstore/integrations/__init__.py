"""Thin adapters between inference engines and the client; nothing in kvstore imports them but the command line."""
