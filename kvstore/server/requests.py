"""Counts and logs the requests of workers: one count and one log line per request, even if it took several calls.

A worker with part of a prompt in memory sends a match first, and fetches only if that saves time. So a match without a
following fetch of the same id is a request too. It is counted at once; the count is taken back if a fetch, or another
layout of the same model, gives a hit after all, and its log line is delayed by a second for that. The log line of a hit
waits until the bytes have been read; when files are read by path, only the worker knows when that is.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kvstore.core import log as lines
from kvstore.core.blocks import KEY_BYTES, Reason
from kvstore.core.reasons import WHOLE, is_needed
from kvstore.core.text import plain_text
from kvstore.server.traffic import Totals, Traffic, Who

# How long the line of a match waits for its fetch, for how long an id is known, and how long a hit may take to read.
MATCH_LINE_S = 1.0
MATCH_S = 10.0
HIT_S = 10.0
OPEN_MAX = 1024
PID_MAX = 1 << 32
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a worker: its number of tokens, the `covered` ones in its memory, and its prefill speed."""

    who: Who
    request_id: str
    prompt_tokens: int
    covered: int = 0
    tokens_per_s: float = 0.0

    @property
    def wanted(self) -> int:
        """Tokens of the prompt that the worker does not have; the last one is always its own to compute."""
        return max(0, self.prompt_tokens - self.covered)


@dataclass(slots=True)
class _Matched:
    """A match that may be all of its request: what was counted for it, and the line that waits."""

    asked: Asked
    counted: Totals
    reason: str
    at_s: float
    line: str


@dataclass(frozen=True, slots=True)
class _Hit:
    """A hit whose bytes are on their way."""

    asked: Asked
    n_tokens: int
    reason: Reason
    nbytes: int
    at_s: float
    end_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Store:
    """A store whose bytes are on their way."""

    asked: Asked
    start: int
    at_s: float


class Requests:
    """See the module. Any thread may call; `settle` once a second."""

    def __init__(self, traffic: Traffic, clock: Callable[[], float] = time.monotonic) -> None:
        self.traffic = traffic
        self._clock = clock
        self._lock = threading.Lock()
        self._matched: OrderedDict[tuple[str, str], _Matched] = OrderedDict()
        self._hits: OrderedDict[str, _Hit] = OrderedDict()
        self._stores: OrderedDict[str, _Store] = OrderedDict()

    # -- asking ----------------------------------------------------------------------------------------------------

    def matched(self, asked: Asked, n_tokens: int, reason: Reason) -> None:
        """A match was answered. With more than the worker has, a fetch will follow, and is what counts."""
        self.computes(asked.who.root, asked.tokens_per_s)
        key = (asked.who.caller, asked.request_id)
        with self._lock:
            before = self._matched.get(key) if asked.request_id else None
        if before is not None and not before.reason:
            return  # another layout of the model has given something
        self._take_back(before)
        alias = lines.plain_alias(asked.who.alias, asked.who.root)
        if n_tokens > asked.covered:
            found = _Matched(asked, Totals(), "", self._clock(), "")
        elif asked.covered:
            words = f"in memory {alias} {asked.covered}/{asked.prompt_tokens} tokens, and the store has no more"
            found = _Matched(asked, Totals(in_memory=1), "in_memory", self._clock(), words)
        else:
            counted = Totals(misses=1, prompt_tokens=asked.wanted)
            line = lines.miss_line(alias, asked.prompt_tokens, reason)
            found = _Matched(asked, counted, reason.value, self._clock(), line)
        self._count(found)
        if asked.request_id:
            with self._lock:
                _put(self._matched, key, found)
        else:
            self._say(found)

    def fetched(self, asked: Asked, fetch_id: str, n_tokens: int, reason: Reason, nbytes: int) -> None:
        """A fetch was planned: a miss, or a hit of so many stored bytes, which are on their way."""
        self.computes(asked.who.root, asked.tokens_per_s)
        with self._lock:
            before = self._matched.pop((asked.who.caller, asked.request_id), None) if asked.request_id else None
        self._take_back(before)
        gained = max(0, n_tokens - asked.covered)
        if not n_tokens:
            self.traffic.count(asked.who, Totals(misses=1, prompt_tokens=asked.wanted), miss=reason.value)
            alias = lines.plain_alias(asked.who.alias, asked.who.root)
            _log(logging.INFO, lines.miss_line(alias, asked.prompt_tokens, reason), asked, reason=reason.value)
            return
        whole = reason in WHOLE
        counted = Totals(hits=whole, shortened=not whole, prompt_tokens=asked.wanted, hit_tokens=gained)
        self.traffic.count(asked.who, counted, shortened="" if whole else reason.value)
        with self._lock:
            _put(self._hits, fetch_id, _Hit(asked, n_tokens, reason, nbytes, self._clock()))

    def handed_over(self, fetch_id: str, *, complete: bool) -> None:
        """The call of a fetch has ended; `complete`: all bytes went by it. By path the worker reads on, and reports."""
        with self._lock:
            hit = self._hits.get(fetch_id)
            if hit is not None and not complete:
                self._hits[fetch_id] = replace(hit, end_s=self._clock())
        if complete:
            self._ended(fetch_id, self._clock())

    def reported(self, fetch_id: str) -> None:
        """The worker says that it has read the bytes."""
        self._ended(fetch_id, self._clock())

    def _ended(self, fetch_id: str, end_s: float) -> None:
        with self._lock:
            hit = self._hits.pop(fetch_id, None)
        if hit is None:
            return
        asked, took_s = hit.asked, max(0.0, end_s - hit.at_s)
        gained = max(0, hit.n_tokens - asked.covered)
        saved_s = self.traffic.saved_s(asked.who.root, gained, took_s)
        if saved_s:
            self.traffic.count(asked.who, Totals(saved_s=saved_s))
        alias = lines.plain_alias(asked.who.alias, asked.who.root)
        line = lines.hit_line(alias, hit.n_tokens, asked.prompt_tokens, hit.nbytes, took_s, hit.reason)
        said = {"tokens": hit.n_tokens, "bytes": hit.nbytes, "seconds": round(took_s, 4), "saved_s": round(saved_s, 3)}
        _log(logging.INFO, line, asked, **said, reason=hit.reason.value)

    def settle(self, *, all: bool = False) -> None:
        """Say what has waited long enough; `all`: everything, since the daemon stops."""
        now_s = self._clock()
        with self._lock:
            due = [one for one in self._matched.values() if one.line and (all or now_s >= one.at_s + MATCH_LINE_S)]
            said = [replace(one) for one in due]
            for one in due:
                one.line = ""
            for key in [key for key, one in self._matched.items() if all or now_s >= one.at_s + MATCH_S]:
                del self._matched[key]
            late = [(key, one) for key, one in self._hits.items() if all or now_s >= one.at_s + HIT_S]
        for one in said:
            self._say(one)
        for fetch_id, hit in late:
            self._ended(fetch_id, hit.end_s or now_s)

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
        self.traffic.count(who, Totals(reused_bytes=self.traffic.reused_bytes(who.root, store.start)))
        took_s = self._clock() - store.at_s
        line = lines.stored_line(lines.plain_alias(who.alias, who.root), new_tokens, new_bytes, took_s)
        short = "" if reason is Reason.OK else f", not all: {reason.value}"
        said = {"tokens": new_tokens, "bytes": new_bytes, "seconds": round(took_s, 4), "reason": reason.value}
        _log(logging.INFO, line + short, store.asked, **said)

    def not_stored(self, asked: Asked, held_tokens: int, reason: Reason) -> None:
        """A store wrote nothing. That all of it is there already, or that it is short, is nobody's loss: a DEBUG line.

        Also of a store that was begun, and given up.
        """
        reused = self.traffic.reused_bytes(asked.who.root, held_tokens)
        self.traffic.count(asked.who, Totals(reused_bytes=reused))
        level = logging.INFO if is_needed(reason) else logging.DEBUG
        alias = lines.plain_alias(asked.who.alias, asked.who.root)
        _log(level, lines.not_stored_line(alias, asked.prompt_tokens, reason), asked, reason=reason.value)

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _count(self, found: _Matched) -> None:
        miss = found.reason if found.counted.misses else ""
        self.traffic.count(found.asked.who, found.counted, miss=miss)

    def _take_back(self, before: _Matched | None) -> None:
        if before is not None and before.line:
            miss = before.reason if before.counted.misses else ""
            self.traffic.count(before.asked.who, before.counted, miss=miss, sign=-1)

    def _say(self, found: _Matched) -> None:
        if found.line:
            level = logging.INFO if found.counted.misses else logging.DEBUG
            _log(level, found.line, found.asked, reason=found.reason)


def who_asks(message: Any, root: bytes, caller: str, pid: int, profile: str = "") -> Who:
    """Who sent a message with a namespace."""
    engine = plain_text(message.engine, lines.ALIAS_CHARACTERS_MAX)
    return Who(caller, pid, root, plain_text(message.alias, lines.ALIAS_CHARACTERS_MAX), engine, profile)


def plain_id(request_id: str) -> str:
    """The id of a request as a line shows it."""
    return plain_text(request_id, lines.ID_CHARACTERS_MAX)


def _put(table: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    table[key] = value
    while len(table) > OPEN_MAX:
        table.popitem(last=False)


def _log(level: int, line: str, asked: Asked, **fields: Any) -> None:
    said = {
        "request": asked.request_id,
        "model": asked.who.alias,
        "namespace": asked.who.root.hex(),
        "pid": asked.who.pid,
        "prompt_tokens": asked.prompt_tokens,
        **fields,
    }
    log.log(level, "%s", lines.with_id(line, asked.request_id), extra={"fields": said})
