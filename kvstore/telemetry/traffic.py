"""Traffic counters of fetches and stores: since start, for the last hour, lifetime, by namespace and by session.

Plain counters. `requests.py` counts, `lifetime.py` keeps the lifetime over a restart, `stats.py` and the command line
read. Nothing here knows gRPC or the engine.
"""

from __future__ import annotations

import operator
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from kvstore.core.bounded import Bounded

HOUR_MINUTES = 60
NAMESPACES_MAX = 256
SESSIONS_MAX = 256
BLOCKS_MAX = 65_536
# Namespaces that a scraper tells apart: the first ones since start, for good, so that no counter ever goes back. What
# comes after them counts as one, whose root is empty.
LABELS_MAX = 64
OTHER = b""
# A number above this in a file is damage; on the wire counters have 64 bits.
COUNT_MAX = 1 << 62
# A session without requests for this long is no longer listed: its worker has most likely ended.
SESSION_S = 86_400.0


@dataclass(slots=True)
class Totals:
    """The counters of one scope; what each means stands beside the fields of `Traffic` in protos/kvstore.proto."""

    hits: int = 0
    shortened: int = 0
    misses: int = 0
    in_memory: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    saved_s: float = 0.0
    stores: int = 0
    stored_tokens: int = 0
    written_bytes: int = 0
    reused_bytes: int = 0
    remote_tokens: int = 0

    def add(self, other: Totals) -> None:
        """Add every number of `other` to the same number here."""
        for name in _NAMES:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def copied(self) -> Totals:
        """A copy. Fast (1 us), since a snapshot copies hundreds under the lock that requests count under."""
        return Totals(*_VALUES(self))

    @classmethod
    def from_dict(cls, counts: Mapping[str, Any]) -> Totals:
        """Inverse of `asdict`. A missing field, or one that is no number, is 0."""
        known = cls()
        for name in _NAMES:
            kind, given = type(getattr(known, name)), counts.get(name)
            if isinstance(given, int | float) and 0 <= given <= COUNT_MAX:
                setattr(known, name, kind(given))
        return known


_NAMES = tuple(one.name for one in fields(Totals))
_VALUES = operator.attrgetter(*_NAMES)


@dataclass(frozen=True, slots=True)
class Who:
    """Who asks: the client by the name it gives itself, its process, and whose KV."""

    caller: str
    pid: int
    root: bytes
    alias: str
    engine: str
    profile: str = ""


@dataclass(slots=True)
class SessionTraffic:
    """One worker and one namespace."""

    who: Who
    last_s: float = 0.0
    last_hit_s: float = 0.0
    totals: Totals = field(default_factory=Totals)


@dataclass(slots=True)
class NamespaceTraffic:
    """One namespace, over its lifetime. `tokens_per_s`: how fast its workers compute prompts, 0 if not known."""

    totals: Totals = field(default_factory=Totals)
    tokens_per_s: float = 0.0


@dataclass(slots=True)
class Labelled:
    """What a scraper reads: since start, of one namespace, or of all that have no label of their own."""

    root: bytes
    alias: str
    totals: Totals = field(default_factory=Totals)


@dataclass(frozen=True)
class Snapshot:
    """All counters of one moment. `changes`: how often anything was counted before it."""

    changes: int
    since_start: Totals
    last_hour: Totals
    lifetime: Totals
    lifetime_since_s: int
    namespaces: dict[bytes, NamespaceTraffic]
    sessions: list[SessionTraffic]
    labelled: list[Labelled]
    miss_reasons: dict[str, int]
    shortened_reasons: dict[str, int]


class Traffic:
    """See the module. Any thread may call; one lock, held for some additions."""

    def __init__(
        self, clock: Callable[[], float] = time.time, lifetime: Totals | None = None, since_s: float = 0.0
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._start = Totals()
        self._lifetime = lifetime or Totals()
        self._since_s = since_s or clock()
        self._minutes: deque[tuple[int, Totals]] = deque(maxlen=HOUR_MINUTES)
        self._namespaces: Bounded[bytes, NamespaceTraffic] = Bounded(NAMESPACES_MAX)
        self._sessions: Bounded[tuple[str, bytes], SessionTraffic] = Bounded(SESSIONS_MAX)
        self._labelled: dict[bytes, Labelled] = {}
        self._misses: Counter[str] = Counter()
        self._shortened: Counter[str] = Counter()
        self._ended_in: Bounded[bytes, int] = Bounded(BLOCKS_MAX)
        self.changes = 0

    def restore(self, root: bytes, namespace: NamespaceTraffic) -> None:
        """Counters of a namespace from an earlier daemon."""
        with self._lock:
            self._namespaces[root] = namespace

    def count(self, who: Who, more: Totals, *, miss: str = "", shortened: str = "") -> None:
        """Count what a request or a store came to, and why it was not more. Counters never go back."""
        now_s = self._clock()
        minute = int(now_s // 60)
        with self._lock:
            self.changes += 1
            session = self._session(who, now_s)
            if not self._minutes or self._minutes[-1][0] != minute:
                self._minutes.append((minute, Totals()))
            for totals in (
                self._start,
                self._lifetime,
                self._minutes[-1][1],
                self._namespace(who.root).totals,
                session.totals,
                self._label(who).totals,
            ):
                totals.add(more)
            if more.hits or more.shortened:
                session.last_hit_s = now_s
            for reasons, code in ((self._misses, miss), (self._shortened, shortened)):
                if code:
                    reasons[code] += 1

    def ended_in(self, key: bytes) -> None:
        """A hit ended in this block."""
        with self._lock:
            self._ended_in[key] = self._ended_in.get(key, 0) + 1

    def hits_of(self, keys: Iterable[bytes]) -> int:
        """How many hits ended in any of these blocks since start."""
        with self._lock:
            return sum(self._ended_in.get(key, 0) for key in keys)

    def computes(self, root: bytes, tokens_per_s: float) -> None:
        """How fast a worker of a namespace computes prompts, as it measured."""
        if tokens_per_s > 0:
            with self._lock:
                self.changes += 1
                self._namespace(root).tokens_per_s = tokens_per_s

    def speed(self, root: bytes) -> float:
        """How many tokens a second the workers of a namespace compute; 0 if that is not known."""
        with self._lock:
            known = self._namespaces.get(root)
            return known.tokens_per_s if known is not None else 0.0

    def saved_s(self, root: bytes, n_tokens: int, took_s: float) -> float:
        """Seconds saved by restoring this many tokens instead of computing them; 0 if the speed is unknown."""
        with self._lock:
            speed = self._namespace(root).tokens_per_s
        return max(0.0, n_tokens / speed - took_s) if speed else 0.0

    def reused_bytes(self, root: bytes, n_tokens: int) -> int:
        """Estimated bytes on disk that were not written because this many tokens were already stored."""
        with self._lock:
            written = self._namespace(root).totals
            return n_tokens * written.written_bytes // max(1, written.stored_tokens)

    def snapshot(self) -> Snapshot:
        """All counters now."""
        now_s = self._clock()
        with self._lock:
            hour = Totals()
            for minute, totals in self._minutes:
                if minute > now_s // 60 - HOUR_MINUTES:
                    hour.add(totals)
            sessions = [
                SessionTraffic(one.who, one.last_s, one.last_hit_s, one.totals.copied())
                for one in self._sessions.values()
                if one.last_s > now_s - SESSION_S
            ]
            return Snapshot(
                changes=self.changes,
                since_start=self._start.copied(),
                last_hour=hour,
                lifetime=self._lifetime.copied(),
                lifetime_since_s=int(self._since_s),
                namespaces={
                    root: NamespaceTraffic(one.totals.copied(), one.tokens_per_s)
                    for root, one in self._namespaces.items()
                },
                sessions=sorted(sessions, key=lambda one: -one.last_s),
                labelled=[Labelled(one.root, one.alias, one.totals.copied()) for one in self._labelled.values()],
                miss_reasons=dict(self._misses),
                shortened_reasons=dict(self._shortened),
            )

    def _namespace(self, root: bytes) -> NamespaceTraffic:
        known = self._namespaces[root] = self._namespaces.get(root) or NamespaceTraffic()
        return known

    def _label(self, who: Who) -> Labelled:
        known = self._labelled.get(who.root)
        if known is None:
            root, alias = (who.root, who.alias) if len(self._labelled) < LABELS_MAX - 1 else (OTHER, "")
            known = self._labelled.setdefault(root, Labelled(root, alias))
        return known

    def _session(self, who: Who, now_s: float) -> SessionTraffic:
        key = (who.caller, who.root)
        known = self._sessions[key] = self._sessions.get(key) or SessionTraffic(who)
        if who.profile and known.who.profile != who.profile:
            known.who = who
        known.last_s = now_s
        return known


def as_counts(totals: Totals) -> dict[str, Any]:
    """The counters by name."""
    return dict(zip(_NAMES, _VALUES(totals), strict=True))
