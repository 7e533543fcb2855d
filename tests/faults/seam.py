"""Points of the engine's `Fs` seam, on whatever thread it calls: just before and just after each call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from kvstore.engine import Fs


class Points:
    """Counts points, one at a time; at number `number` comes `end`, which does not return."""

    def __init__(self, number: int, end: Callable[[], object]) -> None:
        self.passed = 0
        self._number = number
        self._end = end
        self._lock = threading.Lock()

    def at(self) -> None:
        """One more."""
        with self._lock:
            if self.passed == self._number:
                self._end()
            self.passed += 1


class PointFs(Fs):
    """Passes every call on, and tells `at` of each before and after it."""

    def __init__(self, inner: Fs, at: Callable[[], None]) -> None:
        self._inner = inner
        self._at = at

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_") or name == "room":
            return object.__getattribute__(self, name)
        inner, at = object.__getattribute__(self, "_inner"), object.__getattribute__(self, "_at")

        def call(*arguments: Any) -> Any:
            at()
            result = getattr(inner, name)(*arguments)
            at()
            return result

        return call
