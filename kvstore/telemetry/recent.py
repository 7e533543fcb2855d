"""The last requests of workers, for `kvstore top`: what each got, and why it was not more. Kept in memory only.

No tokens and no text of a prompt are kept: only what the log line of the request says.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

# As many as fit a screen.
RECENT_MAX = 32


@dataclass(frozen=True, slots=True)
class Done:
    """One request that has ended. `kind`: hit, miss, in_memory, stored or not_stored; `tokens`: given, or stored."""

    at_s: float
    kind: str
    alias: str
    tokens: int
    prompt_tokens: int
    nbytes: int
    seconds: float
    reason: str
    request_id: str
    pid: int


class Recent:
    """The last RECENT_MAX of them. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: deque[Done] = deque(maxlen=RECENT_MAX)

    def add(self, done: Done) -> None:
        """A request has ended."""
        with self._lock:
            self._done.append(done)

    def latest(self) -> list[Done]:
        """All of them, the latest first."""
        with self._lock:
            return list(reversed(self._done))
