"""Counts and logs the requests of workers: one count and one log line per request, even if it took several calls.

A request is counted once, when its end is known, and no count is ever taken back: scrapers and the hourly history read
differences. A worker with part of a prompt in memory sends a match first, and fetches only if that saves time. So a
match without a following fetch of the same id is a request too; it counts after a second, since a fetch, or another
layout of the same model, may give a hit after all. A hit counts once its bytes have been read. When files are read by
path, only the worker knows when that is, and whether it failed.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from kvstore.core import log as lines
from kvstore.core.blocks import KEY_BYTES, Reason
from kvstore.core.histogram import Histogram
from kvstore.core.reasons import NOT_NEEDED, WHOLE
from kvstore.telemetry.traffic import Totals, Traffic, Who

# How long a match waits for its fetch, for how long an id is known, and how long a hit may take to read.
MATCH_LINE_S = 1.0
MATCH_S = 10.0
HIT_S = 10.0
# Seconds from the plan of a fetch until its bytes were read.
FETCH_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
OPEN_MAX = 1024
IN_MEMORY = "in_memory"
# Stores that come once more, and are counted then.
_OFFERED_AGAIN = (Reason.NOT_CAPTURED, Reason.DEFERRED)
T = TypeVar("T")
log = logging.getLogger(__name__)

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


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a worker: its number of tokens, the `covered` ones in its memory, and its prefill speed.

    `continued`: of a store, the leading tokens that earlier uploads of the same prompt brought or found stored.
    """

    who: Who
    request_id: str
    prompt_tokens: int
    covered: int = 0
    tokens_per_s: float = 0.0
    continued: int = 0

    @property
    def wanted(self) -> int:
        """Tokens of the prompt that the worker does not have; the last one is always its own to compute."""
        return max(0, self.prompt_tokens - self.covered)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a worker got of a planned fetch, as it reports. `reason` is empty if that is all that was planned.

    `again`: it asks once more for the same request, in another way, and that is what counts.
    """

    n_tokens: int = 0
    reason: str = ""
    again: bool = False


AS_PLANNED = Outcome()


@dataclass(frozen=True, slots=True)
class _Matched:
    """A match that may be all of its request. `reason` is empty if it found something: then a fetch will follow."""

    asked: Asked
    reason: str
    at_s: float
    is_told: bool = False


@dataclass(frozen=True, slots=True)
class _Hit:
    """A hit whose bytes are on their way. `is_broken`: its stream ended before all bytes were sent.

    `remote_tokens`: its last ones, which were read from the remote tier for it.
    """

    asked: Asked
    n_tokens: int
    reason: Reason
    nbytes: int
    at_s: float
    remote_tokens: int = 0
    end_s: float = 0.0
    is_broken: bool = False


@dataclass(frozen=True, slots=True)
class _Store:
    """A store whose bytes are on their way."""

    asked: Asked
    start: int
    at_s: float


class Requests:
    """See the module. Any thread may call; `settle` once a second."""

    def __init__(
        self,
        traffic: Traffic,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[..., None] = log.log,
    ) -> None:
        self.traffic = traffic
        # For `kvstore top`: what their log lines say, nothing of a prompt. The latest first; copy it to look at it.
        self.recent: deque[Done] = deque(maxlen=RECENT_MAX)
        self.fetch_s = Histogram(FETCH_BOUNDS_S)
        self._clock = clock
        self._log = say
        self._lock = threading.Lock()
        self._matched: OrderedDict[tuple[str, str], _Matched] = OrderedDict()
        self._hits: OrderedDict[str, _Hit] = OrderedDict()
        self._stores: OrderedDict[str, _Store] = OrderedDict()

    # -- asking ----------------------------------------------------------------------------------------------------

    def matched(self, asked: Asked, n_tokens: int, reason: Reason) -> None:
        """A match was answered. With more than the worker has, a fetch will follow, and is what counts."""
        self.computes(asked.who.root, asked.tokens_per_s)
        why = "" if n_tokens > asked.covered else IN_MEMORY if asked.covered else reason.value
        found, displaced = _Matched(asked, why, self._clock()), None
        if not asked.request_id:
            self._tell_match(found)
            return
        with self._lock:
            key = (asked.who.caller, asked.request_id)
            before = self._matched.get(key)
            # Another layout of the model gave a hit, or the request is counted already.
            if before is None or (before.reason and not before.is_told):
                displaced = _put(self._matched, key, found)
        if displaced is not None:
            self._tell_match(displaced)

    def fetched(
        self, asked: Asked, fetch_id: str, n_tokens: int, reason: Reason, nbytes: int, remote_tokens: int = 0
    ) -> None:
        """A fetch was planned: a miss, or a hit whose stored bytes are now being sent.

        `remote_tokens`: the last ones of `n_tokens`, which were read from the remote tier for it.
        """
        self.computes(asked.who.root, asked.tokens_per_s)
        displaced = None
        with self._lock:
            if asked.request_id:
                self._matched.pop((asked.who.caller, asked.request_id), None)
            if n_tokens:
                hit = _Hit(asked, n_tokens, reason, nbytes, self._clock(), remote_tokens)
                displaced = _put(self._hits, fetch_id, hit)
        if not n_tokens:
            self._tell_miss(asked, reason)
        elif displaced is not None:
            self._tell_hit(displaced, self._clock(), AS_PLANNED)

    def handed_over(self, fetch_id: str, *, complete: bool, by_path: bool = False) -> None:
        """The call of a fetch has ended; `complete`: all bytes went by it. By path the worker reads on, and reports."""
        with self._lock:
            hit = self._hits.get(fetch_id)
            if hit is not None and not complete:
                self._hits[fetch_id] = replace(hit, end_s=self._clock(), is_broken=not by_path)
        if complete:
            self.reported(fetch_id)

    def reported(self, fetch_id: str, outcome: Outcome = AS_PLANNED) -> None:
        """The worker says that it has read the bytes, or what it got instead."""
        with self._lock:
            hit = self._hits.pop(fetch_id, None)
        if hit is not None:
            self._tell_hit(hit, self._clock(), outcome)

    def settle(self, *, all: bool = False) -> None:
        """Count and say what has waited long enough; `all`: everything, since the daemon stops."""
        now_s = self._clock()
        with self._lock:
            due = [
                (key, one)
                for key, one in self._matched.items()
                if not one.is_told and (all or now_s >= one.at_s + MATCH_LINE_S)
            ]
            for key, one in due:
                self._matched[key] = replace(one, is_told=True)
            for key in [key for key, one in self._matched.items() if all or now_s >= one.at_s + MATCH_S]:
                del self._matched[key]
            late = [key for key, one in self._hits.items() if all or now_s >= one.at_s + HIT_S]
            hits = [self._hits.pop(key) for key in late]
        for _, one in due:
            self._tell_match(one)
        for hit in hits:
            # A worker that does not say how it ended: gone if it left a stream, else an older one.
            outcome = Outcome(reason=Reason.DEADLINE.value) if hit.is_broken else AS_PLANNED
            self._tell_hit(hit, hit.end_s or now_s, outcome)

    def computes(self, root: bytes, tokens_per_s: float) -> None:
        """How fast a worker computes prompts, as it says; nothing for what cannot be."""
        if len(root) == KEY_BYTES and 0 < tokens_per_s < math.inf:
            self.traffic.computes(root, tokens_per_s)

    # -- storing ---------------------------------------------------------------------------------------------------

    def begun(self, asked: Asked, upload_id: str, start: int) -> None:
        """A store was begun: what is before `start` is stored already."""
        with self._lock:
            _put(self._stores, upload_id, _Store(asked, start, self._clock()))

    def stored(self, upload_id: str, stored_tokens: int, new_bytes: int, reason: Reason) -> None:
        """A store has ended; what it wrote."""
        with self._lock:
            store = self._stores.pop(upload_id, None)
        if store is None:
            return
        who, new_tokens = store.asked.who, max(0, stored_tokens - store.start)
        if not new_bytes:
            self.not_stored(store.asked, stored_tokens, reason)
            return
        self.traffic.count(who, Totals(stores=1, stored_tokens=new_tokens, written_bytes=new_bytes))
        self._count_reused(store.asked, store.start)
        took_s = self._clock() - store.at_s
        line = lines.stored_line(lines.plain_alias(who.alias, who.root), new_tokens, new_bytes, took_s)
        short = "" if reason is Reason.OK else f", not all: {reason.value}"
        said = {"tokens": new_tokens, "bytes": new_bytes, "seconds": round(took_s, 4), "reason": reason.value}
        self._say(logging.INFO, line + short, "stored", store.asked, **said)

    def not_stored(self, asked: Asked, held_tokens: int, reason: Reason) -> None:
        """A store wrote nothing, or was begun and given up. The line is at DEBUG if nothing was lost: all of it is
        there already, or it is too short.
        """
        if reason not in _OFFERED_AGAIN:
            self._count_reused(asked, held_tokens)
        level = logging.DEBUG if reason in NOT_NEEDED else logging.INFO
        alias = lines.plain_alias(asked.who.alias, asked.who.root)
        line = lines.not_stored_line(alias, asked.prompt_tokens, reason)
        self._say(level, line, "not_stored", asked, tokens=held_tokens, reason=reason.value)

    # -- counting and saying ---------------------------------------------------------------------------------------

    def _count_reused(self, asked: Asked, n_tokens: int) -> None:
        """This many leading tokens were not written; what an earlier upload of the prompt has counted is left out."""
        reused = self.traffic.reused_bytes(asked.who.root, max(0, n_tokens - asked.continued))
        self.traffic.count(asked.who, Totals(reused_bytes=reused))

    def _tell_match(self, found: _Matched) -> None:
        asked = found.asked
        if found.reason == IN_MEMORY:
            self.traffic.count(asked.who, Totals(in_memory=1))
            alias = lines.plain_alias(asked.who.alias, asked.who.root)
            words = f"in memory {alias} {asked.covered}/{asked.prompt_tokens} tokens, and the store has no more"
            self._say(logging.DEBUG, words, IN_MEMORY, asked, tokens=asked.covered)
        elif found.reason:
            self._tell_miss(asked, Reason(found.reason))

    def _tell_miss(self, asked: Asked, reason: Reason) -> None:
        self.traffic.count(asked.who, Totals(misses=1, prompt_tokens=asked.wanted), miss=reason.value)
        line = lines.miss_line(lines.plain_alias(asked.who.alias, asked.who.root), asked.prompt_tokens, reason)
        self._say(logging.INFO, line, "miss", asked, reason=reason.value)

    def _tell_hit(self, hit: _Hit, end_s: float, outcome: Outcome) -> None:
        if outcome.again:
            return
        asked, n_tokens, reason = hit.asked, hit.n_tokens, hit.reason
        if outcome.reason:
            # A name that is not known is of a worker that makes it up: such names fill no counters.
            n_tokens, reason = min(outcome.n_tokens, n_tokens), Reason.of(outcome.reason, Reason.INVALID)
        if not n_tokens:
            self._tell_miss(asked, reason)
            return
        took_s, gained = max(0.0, end_s - hit.at_s), max(0, n_tokens - asked.covered)
        self.fetch_s.observe(took_s)
        saved_s = self.traffic.saved_s(asked.who.root, gained, took_s)
        whole = reason in WHOLE
        counted = Totals(
            hits=whole,
            shortened=not whole,
            prompt_tokens=asked.wanted,
            hit_tokens=gained,
            saved_s=saved_s,
            remote_tokens=max(0, min(gained, n_tokens - (hit.n_tokens - hit.remote_tokens))),
        )
        self.traffic.count(asked.who, counted, shortened="" if whole else reason.value)
        alias = lines.plain_alias(asked.who.alias, asked.who.root)
        line = lines.hit_line(alias, n_tokens, asked.prompt_tokens, hit.nbytes, took_s, reason)
        said = {"tokens": n_tokens, "bytes": hit.nbytes, "seconds": round(took_s, 4), "saved_s": round(saved_s, 3)}
        self._say(logging.INFO, line, "hit", asked, **said, reason=reason.value)

    def _say(self, level: int, line: str, kind: str, asked: Asked, **fields: Any) -> None:
        get, alias = fields.get, lines.plain_alias(asked.who.alias, asked.who.root)
        self.recent.appendleft(
            Done(
                at_s=time.time(),
                kind=kind,
                alias=alias,
                tokens=get("tokens", 0),
                prompt_tokens=asked.prompt_tokens,
                nbytes=get("bytes", 0),
                seconds=get("seconds", 0.0),
                reason=get("reason", ""),
                request_id=asked.request_id,
                pid=asked.who.pid,
            )
        )
        said = {
            "request": asked.request_id,
            "model": asked.who.alias,
            "namespace": asked.who.root.hex(),
            "pid": asked.who.pid,
            "prompt_tokens": asked.prompt_tokens,
            **fields,
        }
        self._log(level, "%s", lines.with_id(line, asked.request_id), extra={"fields": said})


def _put(table: OrderedDict[Any, T], key: Any, value: T) -> T | None:
    """Add to a bounded table. Returns the entry that was dropped for it."""
    table[key] = value
    return table.popitem(last=False)[1] if len(table) > OPEN_MAX else None
