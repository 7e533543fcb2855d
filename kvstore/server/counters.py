"""Plain counters of the daemon since its start, and what else it notes of its traffic."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass

from kvstore.core.blocks import Reason
from kvstore.engine import Engine
from kvstore.server.calls.refusals import Refusals
from kvstore.telemetry.history import Moment
from kvstore.telemetry.lifetime import Lifetime
from kvstore.telemetry.requests import Requests
from kvstore.telemetry.traffic import Snapshot, Traffic
from kvstore.telemetry.why import Why


class Counters:
    """Counters since start. Any thread may count."""

    def __init__(self) -> None:
        self.refusals = Refusals()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._store_reasons: Counter[str] = Counter()
        self._started_s = time.monotonic()

    def add(self, name: str, amount: int = 1) -> None:
        """Count `amount` under `name` (match, fetch, store, hits, ... as in the Stats reply)."""
        with self._lock:
            self._counts[name] += amount

    @property
    def begun(self) -> int:
        """Fetches and stores that began."""
        with self._lock:
            return self._counts["fetch"] + self._counts["store"]

    def stored(self, reason: Reason) -> None:
        """Count why a store gave less than everything."""
        if reason is not Reason.OK:
            with self._lock:
                self._store_reasons[reason.value] += 1

    def store_reasons(self) -> dict[str, int]:
        """Why stores gave less than everything: reason code, count."""
        with self._lock:
            return dict(self._store_reasons)

    def counts(self) -> Counter[str]:
        """A copy of the counters: what was never counted is 0."""
        with self._lock:
            return self._counts.copy()

    @property
    def uptime_s(self) -> int:
        """Whole seconds since the start."""
        return int(time.monotonic() - self._started_s)


@dataclass(frozen=True, slots=True)
class Telemetry:
    """All that a daemon notes of its traffic: each part says which threads may call it.

    `is_real`: false for the one that probes get, whose values nothing reads (`silent`).
    """

    counters: Counters
    requests: Requests
    why: Why
    lifetime: Lifetime
    is_real: bool = True

    def silent(self, engine: Engine) -> Telemetry:
        """A telemetry for probes: accepts every note, logs nothing, and nothing reads it."""
        requests = Requests(Traffic(), say=lambda *_, **__: None)
        return Telemetry(Counters(), requests, Why(engine.nearest, keeps=False), self.lifetime, is_real=False)


def moment_of(engine: Engine, traffic: Snapshot, counters: Counters) -> Moment:
    """What the history notes. Reads the index: call it on a worker thread."""
    disk = engine.stats()
    return Moment(
        totals=traffic.since_start,
        reasons={
            "miss_reasons": traffic.miss_reasons,
            "shortened_reasons": traffic.shortened_reasons,
            "store_reasons": counters.store_reasons(),
        },
        evicted_bytes=sum(nbytes for _, nbytes in disk.evictions.values()),
        used_bytes=disk.used_bytes,
        changes=traffic.changes,
    )
