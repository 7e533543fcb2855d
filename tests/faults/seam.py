"""Points at which tests end a process: calls of the engine's `Fs` seam, or of `os` in one module, on any thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
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


class PointOs:
    """In place of `os` in a module: tells `at` of each call of these names before it."""

    def __init__(self, names: Collection[str], at: Callable[[str], None]) -> None:
        self._names = names
        self._at = at

    def __getattr__(self, name: str) -> Any:
        call = getattr(os, name)
        if name not in self._names:
            return call

        def counted(*given: Any, **named: Any) -> Any:
            self._at(name)
            return call(*given, **named)

        return counted
