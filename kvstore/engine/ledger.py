"""The one counter of size: what the data directory costs on disk, by what it is spent on."""

from __future__ import annotations

import threading


class Ledger:
    """Bytes on disk by account. Any thread may book; a total is a consistent moment.

    blobs: files that rows name; pending: files being written, and what their rows will take; doomed: files without a
    row that a lease keeps a moment longer; index: LMDB's files; staging: uploads; quarantine: damaged blobs.
    """

    ACCOUNTS = ("blobs", "pending", "doomed", "index", "staging", "quarantine")

    def __init__(self) -> None:
        self._bytes = dict.fromkeys(self.ACCOUNTS, 0)
        self._lock = threading.Lock()

    def add(self, account: str, nbytes: int) -> None:
        """Book `nbytes`, which may be negative; an account never goes below zero."""
        with self._lock:
            self._bytes[account] = max(0, self._bytes[account] + nbytes)

    def set(self, account: str, nbytes: int) -> None:
        """What was measured replaces what was booked."""
        with self._lock:
            self._bytes[account] = nbytes

    def get(self, account: str) -> int:
        """One account."""
        return self._bytes[account]

    @property
    def total(self) -> int:
        """Everything."""
        with self._lock:
            return sum(self._bytes.values())

    @property
    def fixed(self) -> int:
        """What no eviction can free."""
        with self._lock:
            return sum(self._bytes.values()) - self._bytes["blobs"]
