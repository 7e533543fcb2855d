"""Histograms of measured times: counts by fixed upper bounds, and the sum."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

# Bounds of block ages, from seconds to months.
AGE_BOUNDS_S = (10, 60, 300, 1800, 3600, 6 * 3600, 86_400, 3 * 86_400, 7 * 86_400, 30 * 86_400, 90 * 86_400)


@dataclass(frozen=True, slots=True)
class Distribution:
    """The counts of one moment: `counts[i]` values were at most `bounds[i]` and above the bound before it.

    The last count, one more than there are bounds, is of values above all bounds.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class Histogram:
    """Counts values. Any thread may call; one lock, held for one addition."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` ascend."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        """Count one value; one below zero, of a clock that was set back, counts as zero."""
        value = max(0.0, value)
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._total += value

    def snapshot(self) -> Distribution:
        """The counts now."""
        with self._lock:
            return Distribution(self._bounds, tuple(self._counts), self._total)
