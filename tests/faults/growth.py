"""By how much the memory and the descriptors of a process grow: what tells a leak from the noise of its work.

Work moves both all the time: buffers, arenas of the C library, connections. A leak lifts the floor beneath all that.
So: the first half of a life is left out, in which caches fill; of the second the least of each half minute counts, and
the median of the slopes between all pairs of these (Theil-Sen) is the growth, which no single jump decides.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW_MIN = 0.5
# A life of fewer windows says nothing.
WINDOWS_MIN = 2
# More than this is a leak. Lives of ten minutes without one: the table of faults in docs/operations.md.
MIB_PER_MIN_MAX = 1.0
FILES_PER_MIN_MAX = 0.5
# Shorter lives are still filling caches and pools; of them the growth is told and not judged.
JUDGED_MIN = 8.0


@dataclass(frozen=True)
class Sample:
    """A process at one time."""

    minutes: float  # since any beginning
    mib: float  # resident memory
    files: float  # open descriptors


@dataclass(frozen=True)
class Growth:
    """What one life of a process came to."""

    minutes: float  # how long it was watched
    mib: float  # resident memory in the end
    mib_per_min: float
    files_per_min: float

    @property
    def faults(self) -> list[str]:
        """What is wrong with it."""
        if self.minutes < JUDGED_MIN:
            return []
        told = (
            (self.mib_per_min, MIB_PER_MIN_MAX, "MiB of memory"),
            (self.files_per_min, FILES_PER_MIN_MAX, "descriptors"),
        )
        return [
            f"leak: {value:+.2f} {what} a minute in a life of {self.minutes:.0f} minutes; at most {limit:g} is noise"
            for value, limit, what in told
            if value > limit
        ]


def growth_of(samples: Sequence[Sample]) -> Growth | None:
    """The growth over the second half of a life; None for one that was too short to tell."""
    if not samples:
        return None
    first, last = samples[0].minutes, samples[-1].minutes
    middle = (first + last) / 2
    windows: dict[int, list[Sample]] = {}
    for sample in samples:
        if sample.minutes >= middle:
            windows.setdefault(int((sample.minutes - middle) / WINDOW_MIN), []).append(sample)
    windows.pop(int((last - middle) / WINDOW_MIN), None)  # not whole: its least is of few samples
    if len(windows) < WINDOWS_MIN:
        return None
    return Growth(
        minutes=last - first,
        mib=samples[-1].mib,
        mib_per_min=slope([(at * WINDOW_MIN, min(each.mib for each in found)) for at, found in windows.items()]),
        files_per_min=slope([(at * WINDOW_MIN, min(each.files for each in found)) for at, found in windows.items()]),
    )


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The median of the slopes between all pairs of points; at least two."""
    pairs = itertools.combinations(points, 2)
    return statistics.median((after - before) / (end - start) for (start, before), (end, after) in pairs)
