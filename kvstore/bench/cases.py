"""The bench runner: runs cases in turn, and reports their times."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore.errors import KVStoreError


@dataclass(frozen=True)
class Case:
    """Something to be timed. `before` and `after` are not.

    `run` may return seconds that it measured itself, e.g. in another process; whatever else it returns is kept until
    the clock has stopped. `ceiling` names the case that this one is divided by, `at_most` the ratio that is promised
    for the shape of docs/benchmarks.md; `nbytes` are those that one run moves.
    """

    name: str
    run: Callable[[], object]
    ceiling: str = ""
    nbytes: int = 0
    at_most: float | None = None
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Measured:
    """A case with the seconds of every round."""

    case: Case
    seconds: tuple[float, ...]

    def percentile(self, share: float) -> float:
        """A percentile: the smallest measured time that at least this share of the times does not exceed."""
        ordered = sorted(self.seconds)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True)
class Report:
    """What a bench found. `facts` are numbers that are not times, by name."""

    bench: str
    shape: dict[str, Any]
    measured: tuple[Measured, ...]
    facts: dict[str, float] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One a case, in the order in which they ran; `ratio` is None without a ceiling."""
        medians = {one.case.name: one.percentile(0.5) for one in self.measured}
        return [_row(one, medians) for one in self.measured]

    def fields(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {
            "bench": self.bench,
            "shape": self.shape,
            "machine": machine(),
            "rounds": max((len(one.seconds) for one in self.measured), default=0),
            "cases": self.rows(),
            "facts": self.facts,
        }


def _row(one: Measured, medians: dict[str, float]) -> dict[str, Any]:
    case, p50_s = one.case, medians[one.case.name]
    ceiling_s = medians.get(case.ceiling)
    return {
        "name": case.name,
        "nbytes": case.nbytes,
        "p50_s": p50_s,
        "p90_s": one.percentile(0.9),
        "p99_s": one.percentile(0.99),
        "max_s": max(one.seconds),
        "bytes_per_s": case.nbytes / p50_s if p50_s else 0.0,
        "ceiling": case.ceiling,
        "ratio": p50_s / ceiling_s if ceiling_s else None,
        "at_most": case.at_most,
    }


def measure(cases: Sequence[Case], rounds: int, warm_ups: int = 1) -> tuple[Measured, ...]:
    """Run every case once a round, in turn: forwards, then backwards. The first `warm_ups` rounds do not count."""
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), "cases have names of their own"
    assert all(case.ceiling in ("", *names) for case in cases), "a ceiling is a case"
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warm_ups + rounds):
        for case in cases if number % 2 == 0 else reversed(cases):
            taken_s = _time(case)
            if number >= warm_ups:
                seconds[case.name].append(taken_s)
    return tuple(Measured(case, tuple(seconds[case.name])) for case in cases)


def _time(case: Case) -> float:
    case.before()
    started_s = time.perf_counter()
    result = case.run()
    taken_s = time.perf_counter() - started_s
    case.after()
    return result if isinstance(result, float) else taken_s


def machine() -> dict[str, Any]:
    """What it ran on, as far as it matters."""
    return {"system": platform.platform(), "machine": platform.machine(), "cpus": os.cpu_count()}


class BenchError(KVStoreError):
    """The measured operation failed, such as a miss instead of a hit, or an incomplete store."""
