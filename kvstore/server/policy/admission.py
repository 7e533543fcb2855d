"""Admission: which stores are written. It decides about disk writes alone; what is stored is always served.

always         all that the write budget of the day allows
staged         of those, what is offered for the second time; the first time it stays in the worker's memory
auto           always, until a fifth of the day's write budget is left; then staged
read-only      none

Staged stores are those of workers with a memory tier, which name the prompt that they compute: the tier offers them
again when they are asked for again, or when the worker ends soon after. What other callers bring is always written.

The write budget is how many bytes may still be written to disk today: a token bucket that holds one day.
It refills continuously, by wall clock, so that a machine that sleeps or is off refills it as well. A clock that is set
back refills nothing until it goes on; one that jumps ahead refills a day at most. What was used lies in
`settings/write_budget.json`; a kill loses what was written in the last seconds.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvstore.blobs.fs import replace_file
from kvstore.config import Config, automatic_write_bytes
from kvstore.core.blocks import Reason
from kvstore.engine import Engine

STAGED, AUTO, READ_ONLY = "staged", "auto", "read-only"
# `auto` is staged once less than this part of the day's write budget is left.
STAGED_DIVISOR = 5
FILE = "write_budget.json"
DAY_S = 86_400
# The file is written when so much of the day's bytes, or so long, has passed since it was written last.
KEEP_DIVISOR = 100
KEEP_EVERY_S = 10.0
DETAILS = {
    Reason.READ_ONLY: "admission is read-only: kvstore set daemon admission=auto",
    Reason.WRITE_BUDGET: "write_bytes_per_day_max is used up, and refills continuously: kvstore stats",
}
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


@dataclass(frozen=True, slots=True)
class HeldBack:
    """Stores that were not written, in whole or in part, since start, and the raw bytes of KV that they would bring."""

    stores: int = 0
    nbytes: int = 0


class StoreAdmission:
    """Any thread may call."""

    def __init__(self, mode: str, budget: WriteBudget) -> None:
        self.mode = mode
        self.budget = budget
        self.held_back = HeldBack()
        self._lock = threading.Lock()

    def refusal(self) -> Reason:
        """Why nothing may be written now; OK when stores are taken."""
        if self.mode == READ_ONLY:
            return Reason.READ_ONLY
        return Reason.WRITE_BUDGET if self.budget.left_bytes <= 0 else Reason.OK

    @property
    def is_staged(self) -> bool:
        """Whether what is offered for the first time waits in the worker's memory. Not when nothing may be written."""
        if self.refusal() is not Reason.OK:
            return False
        return self.mode == STAGED or (self.mode == AUTO and self.is_short)

    @property
    def is_short(self) -> bool:
        """Whether less than a fifth of the day's write budget is left."""
        return self.budget.left_bytes * STAGED_DIVISOR <= self.budget.day_bytes

    def change(self, config: Config) -> None:
        """Go by other settings from now on. What was used of the day stays used."""
        self.budget.day_bytes = day_bytes(config)
        self.mode = config.admission

    def hold_back(self, nbytes: int) -> None:
        """Count a store of which so much was not taken."""
        with self._lock:
            self.held_back = HeldBack(self.held_back.stores + 1, self.held_back.nbytes + nbytes)


def store_admission(engine: Engine, config: Config) -> StoreAdmission:
    """As configured, with what the store has written today."""
    path = config.data_dir / "settings" / FILE
    budget = WriteBudget(day_bytes(config), lambda: engine.put_bytes, path, sync=config.durability != "none")
    return StoreAdmission(config.admission, budget)


def day_bytes(config: Config) -> int:
    """What may be written in a day; an automatic limit depends on the size of the volume."""
    return config.write_bytes_per_day_max or automatic_write_bytes(_volume_bytes(config.data_dir))


def _volume_bytes(folder: Path) -> int:
    volume = os.statvfs(folder)
    return volume.f_blocks * volume.f_frsize
