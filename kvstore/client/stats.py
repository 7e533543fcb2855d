"""Counters of one session."""

from __future__ import annotations

import threading
from collections import Counter

from kvstore.client.results import Hit, LayerHit, Miss, StoreResult
from kvstore.core.blocks import Reason


class SessionStats:
    """Plain counters of one session. Any thread may count; reading takes no lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.hits = 0
        self.hit_tokens = 0
        self.misses: Counter[str] = Counter()  # by reason
        self.stores: Counter[str] = Counter()  # by reason, "ok" among them; one for each piece that was sent
        self.stored_bytes = 0
        self.not_captured_tokens = 0

    def fetched(self, answer: Hit | LayerHit | Miss) -> None:
        """Count a fetch."""
        with self._lock:
            if isinstance(answer, Miss):
                self.misses[answer.reason.value] += 1
            else:
                self.hits += 1
                self.hit_tokens += answer.n_tokens

    def stored(self, result: StoreResult, n_tokens: int = 0) -> None:
        """Count the end of a store of `n_tokens`."""
        with self._lock:
            self.stores[result.reason.value] += 1
            self.stored_bytes += result.new_bytes
            if result.reason is Reason.NOT_CAPTURED:
                self.not_captured_tokens += max(0, n_tokens - result.stored_tokens)
