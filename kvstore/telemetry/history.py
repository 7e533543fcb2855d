"""What the store did in each hour of the last 90 days, for `kvstore stats --html`.

A row is made of differences of the counters since start. The hour that is going on is written with the lifetime
counters, once a minute; a finished one goes into `settings/history.json`, which is replaced once an hour and holds at
most ROWS_MAX rows, less than 500 kB. If the file is lost or damaged, the daemon logs that and begins a new one; nothing
else depends on it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvstore.blobs.fs import replace_file
from kvstore.telemetry.traffic import COUNT_MAX, Totals, as_counts

FILE = "history.json"
VERSION = 1
HOUR_S = 3600
ROWS_MAX = 90 * 24
FILE_BYTES_MAX = 4 << 20
CODE_CHARACTERS_MAX = 40
CODES_MAX = 64
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Moment:
    """The counters since start at one moment, and what the disk holds; of an hour: what it added to them.

    `reasons` are counts by kind (`KINDS`) and reason code. `changes` orders moments, since two threads take them.
    """

    totals: Totals = field(default_factory=Totals)
    reasons: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    evicted_bytes: int = 0
    used_bytes: int = 0
    changes: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return self.totals == Totals() and not self.evicted_bytes and not any(self.reasons.values())


_NOTHING = Moment()


class History:
    """See the module. Any thread may call; `save` writes the disk."""

    def __init__(self, folder: Path, *, sync: bool = True, clock: Callable[[], float] = time.time) -> None:
        """Read the file. Never raises: a missing or damaged file counts as empty."""
        self._path = folder / FILE
        self._sync = sync
        self._clock = clock
        self._lock = threading.Lock()
        self._before = _NOTHING
        self._rows = self._read()
        self._saved = set(self._rows)
        self.changes = 0

    def note(self, now: Moment) -> None:
        """Count what was added since the last call, in this hour."""
        hour_s = int(self._clock()) // HOUR_S * HOUR_S
        with self._lock:
            if now.changes < self._before.changes:
                return  # a later one was quicker
            row = self._rows.get(hour_s, Moment())
            more = _difference(now, self._before)
            self._before = now
            if more.is_empty and (row.used_bytes == now.used_bytes or row.is_empty):
                return
            self.changes += 1
            self._rows[hour_s] = replace(_sum(row, more), used_bytes=now.used_bytes)
            self._prune(hour_s)

    def rows(self) -> dict[int, Moment]:
        """What each hour added, by its first second since 1970, the oldest first; empty hours are left out."""
        with self._lock:
            return dict(sorted(self._rows.items()))

    def open_row(self) -> dict[str, Any]:
        """The last row, as `restore` takes it: the caller keeps it until its hour has ended."""
        rows = self.rows()
        return {"row": _to_list(*next(reversed(rows.items())))} if rows else {}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Take back what `open_row` gave an earlier daemon, unless the file has it. Raises ValueError and its like."""
        if "row" in record:
            hour_s, row = _from_list(record["row"])
            with self._lock:
                if hour_s not in self._saved:
                    self._rows[hour_s] = row
                self._prune(int(self._clock()))

    def save(self) -> None:
        """Write the file if an hour has ended since it was written. Raises OSError."""
        hour_s = int(self._clock()) // HOUR_S * HOUR_S
        finished = {at: row for at, row in self.rows().items() if at != hour_s}
        if finished.keys() <= self._saved:
            return
        rows = [_to_list(at, row) for at, row in finished.items()]
        record = {"version": VERSION, "columns": COLUMNS, "rows": rows}
        replace_file(self._path, json.dumps(record, separators=(",", ":")).encode() + b"\n", self._sync)
        self._saved = set(finished)

    def _prune(self, now_s: int) -> None:
        """Drop what is too old, and what a clock that was ahead has left in the future."""
        kept = {at: row for at, row in self._rows.items() if now_s - ROWS_MAX * HOUR_S < at <= now_s + HOUR_S}
        self._rows = dict(sorted(kept.items())[-ROWS_MAX:])

    def _read(self) -> dict[int, Moment]:
        try:
            with self._path.open("rb") as file:
                record = json.loads(file.read(FILE_BYTES_MAX))
            if record["version"] != VERSION or record["columns"] != COLUMNS:
                raise ValueError(f"version {record['version']}")
            return dict(_from_list(row) for row in record["rows"][-ROWS_MAX:])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            log.warning("%s cannot be read, so the history starts again: %s", self._path, error)
            return {}


KINDS = ("miss_reasons", "shortened_reasons", "store_reasons")
COLUMNS = ["hour_s", *as_counts(Totals()), "evicted_bytes", "used_bytes", *KINDS]


def _difference(now: Moment, before: Moment) -> Moment:
    counts, earlier = as_counts(now.totals), as_counts(before.totals)
    reasons = {kind: Counter(now.reasons.get(kind, {})) - Counter(before.reasons.get(kind, {})) for kind in KINDS}
    totals = Totals.from_dict({name: value - earlier[name] for name, value in counts.items()})
    return Moment(totals, reasons, max(0, now.evicted_bytes - before.evicted_bytes))


def _sum(row: Moment, more: Moment) -> Moment:
    totals = replace(row.totals)
    totals.add(more.totals)
    reasons = {kind: Counter(row.reasons.get(kind, {})) + Counter(more.reasons.get(kind, {})) for kind in KINDS}
    return Moment(totals, reasons, row.evicted_bytes + more.evicted_bytes)


def _to_list(hour_s: int, row: Moment) -> list[Any]:
    counts = {**as_counts(row.totals), "saved_s": round(row.totals.saved_s, 3)}
    reasons = [dict(row.reasons.get(kind, {})) for kind in KINDS]
    return [hour_s, *counts.values(), row.evicted_bytes, row.used_bytes, *reasons]


def _from_list(values: list[Any]) -> tuple[int, Moment]:
    """ValueError or its like for what is no row."""
    named = dict(zip(COLUMNS, values, strict=True))
    hour_s, evicted_bytes, used_bytes = (_count(named[name]) for name in ("hour_s", "evicted_bytes", "used_bytes"))
    if hour_s % HOUR_S:
        raise ValueError(f"no hour begins at {hour_s}")
    reasons = {}
    for kind in KINDS:
        codes = {str(code)[:CODE_CHARACTERS_MAX]: _count(count) for code, count in named[kind].items()}
        reasons[kind] = dict(list(codes.items())[:CODES_MAX])
    return hour_s, Moment(Totals.from_dict(named), reasons, evicted_bytes, used_bytes)


def _count(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value <= COUNT_MAX:
        raise ValueError(f"{value!r} is no count")
    return value
