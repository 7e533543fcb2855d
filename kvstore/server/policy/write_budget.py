"""The write budget: how many bytes may still be written to disk today. A token bucket that holds one day.

It refills continuously, by wall clock, so that a machine that sleeps or is off refills it as well. A clock that is set
back refills nothing until it goes on; one that jumps ahead refills a day at most. What was used lies in
`settings/write_budget.json`; a kill loses what was written in the last seconds.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kvstore.blobs.fs import replace_file

FILE = "write_budget.json"
DAY_S = 86_400
# The file is written when so much of the day's bytes, or so long, has passed since it was written last.
KEEP_DIVISOR = 100
KEEP_EVERY_S = 10.0
log = logging.getLogger(__name__)


class WriteBudget:
    """Counts what the engine writes. Any thread may look; one at a time calls `keep`, which writes the file."""

    def __init__(
        self,
        day_bytes: int,
        put_bytes: Callable[[], int],
        path: Path | None = None,
        *,
        sync: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`put_bytes`: all that was written since the engine was opened. `path` None: nothing is kept."""
        self.day_bytes = day_bytes
        self._put_bytes = put_bytes
        self._path = path
        self._sync = sync
        self._clock = clock
        self._lock = threading.Lock()
        self._seen_bytes = put_bytes()
        self._unkept_bytes = 0
        self._kept_s = time.monotonic()
        self._used_bytes, self._at_s = self._read()

    @property
    def left_bytes(self) -> int:
        """What may be written now; below 0 when more was written than that."""
        with self._lock:
            self._settle()
            return self.day_bytes - math.ceil(self._used_bytes)

    @property
    def is_empty(self) -> bool:
        """Whether nothing may be written now."""
        return self.left_bytes <= 0

    def keep(self, *, now: bool = False) -> None:
        """Write the file when enough has changed; `now`: in any case. Raises nothing that a disk can do."""
        with self._lock:
            self._settle()
            age_s, unkept = time.monotonic() - self._kept_s, self._unkept_bytes
            is_due = age_s >= KEEP_EVERY_S or unkept * KEEP_DIVISOR >= self.day_bytes
            record = {"used_bytes": math.ceil(self._used_bytes), "at_s": self._at_s}
        if self._path is None or not (now or (unkept and is_due)):
            return
        try:
            replace_file(self._path, json.dumps(record).encode() + b"\n", self._sync)
        except OSError as error:  # a full disk, or one that is gone: the next second tries again
            log.debug("the write budget was not kept: %s", error)
            return
        with self._lock:
            self._unkept_bytes -= unkept
            self._kept_s = time.monotonic()

    def _settle(self) -> None:
        """Take in what was written, and the time that passed. Hold the lock."""
        now_s, put = self._clock(), self._put_bytes()
        passed_s = min(DAY_S, max(0.0, now_s - self._at_s))
        written, self._seen_bytes, self._at_s = put - self._seen_bytes, put, now_s
        used = max(0.0, self._used_bytes - self.day_bytes * passed_s / DAY_S)
        # An import writes as much as a person asks for; what it cost is made good within two days.
        self._used_bytes = min(used + written, max(used, 2.0 * self.day_bytes))
        self._unkept_bytes += written

    def _read(self) -> tuple[float, float]:
        """(bytes used, the wall clock at that time); nothing used when there is no file, or none of ours."""
        unused = 0.0, self._clock()
        if self._path is None:
            return unused
        try:
            record = json.loads(self._path.read_bytes())
            used, at_s = float(record["used_bytes"]), float(record["at_s"])
            if not (math.isfinite(used) and math.isfinite(at_s) and used >= 0):
                raise ValueError(f"{used} bytes at {at_s}")
            return used, at_s
        except FileNotFoundError:
            return unused
        except (OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            log.warning("%s cannot be read, so the write budget of the day starts unused: %s", self._path, error)
            return unused
