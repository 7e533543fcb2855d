"""Counters that outlive a daemon: `settings/traffic.json` in the data directory, written at most once a minute.

The hour of the history that is going on (`history.py`) is written with them. If the daemon is killed, counts since the
last write are lost. The file is small (a few numbers for each of at most 256
namespaces). If it is lost or damaged, the daemon logs that and starts counting from zero; nothing else depends on it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvstore.blobs.fs import replace_file
from kvstore.telemetry.history import History, Moment
from kvstore.telemetry.traffic import NamespaceTraffic, Snapshot, Totals, Traffic, as_counts

FILE = "traffic.json"
VERSION = 2
WRITE_EVERY_S = 60.0
log = logging.getLogger(__name__)


class Lifetime:
    """The file, and the traffic that it was read into. One thread at a time: it reads and writes the disk."""

    def __init__(self, folder: Path, *, sync: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file into the counters. Never raises: a missing or damaged file counts as empty."""
        self._path = folder / FILE
        self._sync = sync
        self._clock = clock
        self._written_s = self._noted_s = clock() - WRITE_EVERY_S
        self.history = History(folder, sync=sync)
        self.traffic = self._read()
        self._changes = self._changed

    @property
    def _changed(self) -> tuple[int, int]:
        return self.traffic.changes, self.history.changes

    def keep(self, moment: Callable[[Snapshot], Moment], *, now: bool = False) -> None:
        """Write the counters if a minute has passed and they have changed; `now`: whenever they have changed.

        `moment`: what the history notes of the counters; called when they have changed, and once a minute.
        """
        is_news = self._changed != self._changes and self._clock() >= self._written_s + WRITE_EVERY_S
        if not (now or is_news or self._clock() >= self._noted_s + WRITE_EVERY_S):
            return
        self._noted_s = self._clock()
        traffic_changes, known = self.traffic.changes, self.traffic.snapshot()
        self.history.note(moment(known))
        changes = traffic_changes, self.history.changes
        try:
            self.history.save()
            if changes == self._changes:
                return
            self._written_s = self._clock()
            replace_file(self._path, self._record(known), self._sync)
        except OSError as error:  # a full disk, or one that is gone: the next minute tries again
            log.debug("the lifetime counters were not written: %s", error)
            return
        self._changes = changes

    def _record(self, known: Snapshot) -> bytes:
        namespaces = {
            root.hex(): {**as_counts(one.totals), "tokens_per_s": one.tokens_per_s}
            for root, one in known.namespaces.items()
        }
        record = {
            "version": VERSION,
            "since_s": known.lifetime_since_s,
            "total": as_counts(known.lifetime),
            "namespaces": namespaces,
            "hour": self.history.open_row(),
        }
        return json.dumps(record).encode() + b"\n"

    def _read(self) -> Traffic:
        try:
            record = json.loads(self._path.read_bytes())
            traffic = _traffic(record)
            self.history.restore(record["hour"])
            return traffic
        except FileNotFoundError:
            return Traffic()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s cannot be read, so the lifetime counters start at 0: %s", self._path, error)
            return Traffic()


def _traffic(record: dict[str, Any]) -> Traffic:
    """The traffic that a record describes. Raises ValueError and its like for one that is none of ours."""
    if record["version"] != VERSION:
        raise ValueError(f"version {record['version']}")
    traffic = Traffic(lifetime=Totals.from_dict(record["total"]), since_s=float(record["since_s"]))
    for root, counts in record["namespaces"].items():
        traffic.restore(bytes.fromhex(root), NamespaceTraffic(Totals.from_dict(counts), float(counts["tokens_per_s"])))
    return traffic
