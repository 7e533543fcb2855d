"""Admission: which stores are written. It decides about disk writes alone; what is stored is always served.

always         all that the write budget of the day allows
staged         of those, what is offered for the second time; the first time it stays in the worker's memory
auto           always, until a fifth of the day's write budget is left; then staged
read-only      none

Staged stores are those of workers with a memory tier, which name the prompt that they compute: the tier offers them
again when they are asked for again, or when the worker ends soon after. What other callers bring is always written.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvstore.config import Config, automatic_write_bytes
from kvstore.core.blocks import Reason
from kvstore.engine import Engine, NewBlock
from kvstore.server.policy.write_budget import FILE, WriteBudget

STAGED, AUTO, READ_ONLY = "staged", "auto", "read-only"
# `auto` is staged once less than this part of the day's write budget is left.
STAGED_DIVISOR = 5
DETAILS = {
    Reason.READ_ONLY: "admission is read-only: kvstore set daemon admission=auto",
    Reason.WRITE_BUDGET: "write_bytes_per_day_max is used up, and refills continuously: kvstore stats",
}


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
        return Reason.WRITE_BUDGET if self.budget.is_empty else Reason.OK

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


class Taken:
    """The blocks of a store, as long as they may be written: then it ends, and `reason` says why.

    A checkpoint follows the blocks that it continues: without it they are of no use, so it is written with them.
    """

    def __init__(self, admission: StoreAdmission, blocks: Iterable[NewBlock]) -> None:
        self._admission = admission
        self._blocks = blocks
        self.reason = Reason.OK

    def __iter__(self) -> Iterator[NewBlock]:
        for block in self._blocks:
            refusal = self._admission.refusal()
            if refusal is not Reason.OK and not block.block.is_checkpoint:
                self.reason = refusal
                return
            yield block


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
