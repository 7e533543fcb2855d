"""Counters that outlive a daemon: `settings/traffic.json` in the data directory, written at most once a minute.

If the daemon is killed, counts since the last write are lost. The file is small (a few numbers for each of at most 256
namespaces). If it is lost or damaged, the daemon logs that and starts counting from zero; nothing else depends on it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvstore.blobs.fs import Fs, unlink_quietly, write_durably
from kvstore.blobs.protocol import TMP_SUFFIX
from kvstore.server.traffic import Namespace, Totals, Traffic, as_counts

FILE = "traffic.json"
VERSION = 1
WRITE_EVERY_S = 60.0
log = logging.getLogger(__name__)


class Lifetime:
    """The file, and the traffic that it was read into. One thread at a time: it reads and writes the disk."""

    def __init__(self, folder: Path, *, sync: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file into the counters. Never raises: a missing or damaged file counts as empty."""
        self._folder = folder
        self._path = folder / FILE
        self._sync = sync
        self._clock = clock
        self._written_s = clock() - WRITE_EVERY_S
        self.traffic = self._read()
        self._changes = self.traffic.changes

    def keep(self, *, now: bool = False) -> None:
        """Write the counters if a minute has passed and they have changed; `now`: whenever they have changed."""
        if self.traffic.changes == self._changes or not (now or self._clock() >= self._written_s + WRITE_EVERY_S):
            return
        self._written_s = self._clock()
        changes, fs = self.traffic.changes, Fs()
        try:
            unlink_quietly(fs, [f"{self._path}{TMP_SUFFIX}"])
            write_durably(fs, str(self._path), [memoryview(self._record())], self._sync)
            if self._sync:
                fs.fsync_dir(str(self._folder))
        except OSError as error:  # a full disk, or one that is gone: the next minute tries again
            log.debug("the lifetime counters were not written: %s", error)
            return
        self._changes = changes

    def _record(self) -> bytes:
        known = self.traffic.snapshot()
        namespaces = {
            root.hex(): {**as_counts(one.totals), "tokens_per_s": one.tokens_per_s}
            for root, one in known.namespaces.items()
        }
        record = {
            "version": VERSION,
            "since_s": known.lifetime_since_s,
            "total": as_counts(known.lifetime),
            "namespaces": namespaces,
        }
        return json.dumps(record).encode() + b"\n"

    def _read(self) -> Traffic:
        try:
            return _traffic(json.loads(self._path.read_bytes()))
        except FileNotFoundError:
            return Traffic()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s cannot be read, so the lifetime counters begin anew: %s", self._path, error)
            return Traffic()


def _traffic(record: dict[str, Any]) -> Traffic:
    """The traffic that a record describes. Raises ValueError and its like for one that is none of ours."""
    if record["version"] != VERSION:
        raise ValueError(f"version {record['version']}")
    traffic = Traffic(lifetime=Totals.from_dict(record["total"]), since_s=float(record["since_s"]))
    for root, counts in record["namespaces"].items():
        traffic.restore(bytes.fromhex(root), Namespace(Totals.from_dict(counts), float(counts["tokens_per_s"])))
    return traffic
