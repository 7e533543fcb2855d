"""The command line: one module a verb, imported when the verb is used, so that `kvstore stats` never waits for MLX."""

from kvstore.cli.app import main

__all__ = ["main"]
