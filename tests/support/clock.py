"""A clock that a test moves."""

from __future__ import annotations


class Clock:
    """Seconds, wall or monotonic; it stands still until `now_s` is set."""

    def __init__(self, now_s: float = 1_800_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s
