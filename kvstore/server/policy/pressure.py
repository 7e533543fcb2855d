"""Pressure: while the store fills up, what the profile `auto` stored is re-encoded with fewer bits.

From 80 % of the budget on, `auto` takes the smallest profile that `kvstore calibrate` let pass for a model, and an idle
daemon re-encodes the coldest blocks that `auto` stored with it, until 70 % of the budget are left in use. Each block
once, from its stored codes; the error that this adds is measured and kept. Only a store that is full evicts.

    watermark      80 % on, 70 % off: between the two nothing changes
    quiet          nothing stored or fetched now nor in the last seconds; a call in the middle of a block ends the block
    power          neither on battery nor in Low Power Mode
    write budget   more than a fifth of the day is left, since this writes, too

Between pieces of device work, of about 40 ms, the lane takes fetches and stores, and the re-encoding gives way.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from kvstore.blobs.format import make_ready
from kvstore.blobs.protocol import RangeReader
from kvstore.blobs.ranges import BufferReader, Range
from kvstore.codecs.byte_plan import HitBlock
from kvstore.codecs.profiles import Profile
from kvstore.codecs.runs import EncodedRun
from kvstore.codecs.transcode import gather_layers, is_finite, relative_error, transcode
from kvstore.config import Config
from kvstore.core.blocks import FIDELITY_EXACT, Block, Reason
from kvstore.core.byte_budget import ByteBudget
from kvstore.core.layers import Layout
from kvstore.core.text import size_text
from kvstore.engine import Engine, NewBlock, Row, Slice
from kvstore.errors import AuxMissingError, CorruptDataError, KVStoreError
from kvstore.server.fetching.decode import decode_piece
from kvstore.server.lane import Lane
from kvstore.server.policy.admission import StoreAdmission
from kvstore.server.policy.gate import Gate
from kvstore.server.policy.power import Power

T = TypeVar("T")

HIGH_PERCENT, LOW_PERCENT = 80, 70
# Nothing was stored or fetched for this long.
QUIET_S = 2.0
# How long nothing is tried after a blob could not be exchanged.
PAUSE_S = 30.0
# A blob that would shrink by less than this part is not worth the write.
SAVED_DIVISOR = 10
# Copies of a block's values at a time: before, after, and those that are being encoded.
COPIES = 3
BUSY = "stores or fetches are under way"
NOT_CALIBRATED = "no profile smaller than auto's has passed on a stored model; run: kvstore calibrate --model PATH"
log = logging.getLogger(__name__)


class Watermark:
    """Whether the store fills up: from HIGH_PERCENT of its budget on, until it is below LOW_PERCENT. Any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_reached = False

    def __call__(self) -> bool:
        """Whether it does now."""
        percent = LOW_PERCENT if self._is_reached else HIGH_PERCENT
        used, budget = self._engine.used_bytes, self._engine.budget_bytes
        self._is_reached = budget > 0 and used * 100 >= budget * percent
        return self._is_reached


class Quiet:
    """Whether nothing is stored or fetched. One thread."""

    def __init__(
        self, busy: Callable[[], bool], begun: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`busy`: whether anything is under way; `begun`: fetches and stores that began so far."""
        self._busy = busy
        self._begun = begun
        self._clock = clock
        self._seen = -1
        self._since_s = 0.0

    def is_long(self) -> bool:
        """Whether it is quiet, and was for QUIET_S."""
        if self.is_disturbed() or self._busy():
            self._seen, self._since_s = self._begun(), self._clock()
        return self._clock() - self._since_s >= QUIET_S

    def is_disturbed(self) -> bool:
        """Whether anything began since it was quiet."""
        return self._begun() != self._seen


class _DisturbedError(Exception):
    """Something is stored or fetched, or the daemon stops: the block waits."""


class Pressure:
    """Re-encodes on a thread of its own (`step`); the device work of it runs on the lane."""

    def __init__(
        self,
        engine: Engine,
        lane: Lane,
        gate: Gate,
        admission: StoreAdmission,
        buffers: ByteBudget,
        config: Config,
        watermark: Watermark,
        quiet: Quiet,
        power: Power,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        """`buffers`: the daemon's memory_bytes. `is_over`: the daemon stops."""
        self._engine = engine
        self._lane = lane
        self._gate = gate
        self._admission = admission
        self._buffers = buffers
        self._config = config
        self.watermark = watermark
        self._quiet = quiet
        self._power = power
        self._is_over = is_over
        self._not_before_s = 0.0
        self._failure = ""
        # Why nothing is re-encoded now; empty while something is. For `stats`.
        self.why_not = "the daemon has just started"

    def step(self) -> None:
        """Re-encode block by block until something is in the way. Once a second, on one thread; raises nothing that a
        disk can do."""
        before = self._engine.reencoder.stats()
        self._step()
        after = self._engine.reencoder.stats()
        if blocks := after.blocks - before.blocks:
            sizes = (after.before_bytes - before.before_bytes, after.after_bytes - before.after_bytes)
            log.info("re-encoded %d blocks: %s became %s", blocks, *map(size_text, sizes))

    def _step(self) -> None:
        while not self._is_over():
            targets = self._targets()
            self.why_not = self._why_not(targets)
            if self.why_not:
                return
            try:
                row = next(iter(self._engine.reencoder.coldest(list(targets), 1)), None)
                if row is None:
                    self.why_not = "nothing is left that auto stored and that is not pinned"
                    return
                self._failure = self._reencode(row, targets[row.root])
            except _DisturbedError:
                self.why_not = BUSY
                return
            except (KVStoreError, OSError) as error:
                self._failure = str(error)
            if self._failure:
                self._not_before_s = time.monotonic() + PAUSE_S
                log.warning("re-encoding waits for %d s: %s", PAUSE_S, self._failure)

    def _targets(self) -> dict[bytes, Profile]:
        """The smaller profile of each namespace that has one."""
        found = ((root, self._gate.smaller(root)) for root in self._engine.reencoder.roots)
        return {root: profile for root, profile in found if profile is not None}

    def _why_not(self, targets: dict[bytes, Profile]) -> str:
        """Why nothing is re-encoded now; empty when it is time."""
        if self._engine.reencoder.roots and not targets:
            return NOT_CALIBRATED
        if not self.watermark():
            return f"the store is below {HIGH_PERCENT} % of its budget"
        if degraded := self._engine.degraded:
            return degraded
        if self._admission.refusal() is not Reason.OK or self._admission.is_short:
            return "nothing is written now, or little is left of the day's write budget"
        if saving := self._power.why_save():
            return f"the machine is {saving}"
        if not self._quiet.is_long():
            return BUSY
        return self._failure if time.monotonic() < self._not_before_s else ""

    def _reencode(self, row: Row, profile: Profile) -> str:
        """Re-encode one block, or note that it stays as it is; why not, when it is to be tried again later."""
        info, reencoder = self._engine.namespace(row.root), self._engine.reencoder
        if info is None:
            return ""  # it was evicted meanwhile
        threshold = max(self._config.min_quantize_tokens, profile.min_quantize_tokens)
        is_short = row.fidelity >= FIDELITY_EXACT and row.end < threshold
        if row.fidelity <= profile.fidelity or is_short:
            reencoder.leave(row)
            return ""
        nbytes = COPIES * info.layout.token_bytes * row.n_tokens + row.blob_bytes
        if not self._buffers.try_acquire(nbytes):
            limit = self._buffers.limit_bytes
            return f"a block takes {size_text(nbytes)} of buffers, and memory_bytes = {size_text(limit)} are in use"
        try:
            if not self._engine.has_aux(row.root, profile.references):
                return f"the basis of profile {profile.name} is not there"
            new, error = self._encoded(row, profile, info.layout, info.to_record())
        except (CorruptDataError, AuxMissingError) as damage:
            if self._engine.holds(row.key):  # it was not evicted meanwhile
                reencoder.leave(row, f"it cannot be read: {damage}")
            return ""
        finally:
            self._buffers.release(nbytes)
        if new is None:
            reencoder.leave(row, "it has values that are not finite, or would not be smaller")
            return ""
        is_done = reencoder.reencode(row, new, error)
        return (
            "" if is_done else "a block could not be exchanged: it changed meanwhile, or there is no room for its copy"
        )

    def _encoded(self, row: Row, profile: Profile, layout: Layout, record: bytes) -> tuple[NewBlock | None, float]:
        """The block in fewer bits and its relative error; None when it is to stay as it is."""
        block = row.block
        with (
            self._engine.lease([row]),
            contextlib.closing(self._engine.reader([Slice(row, row.n_tokens)])) as reader,
        ):
            before = self._decoded(layout, block, reader)
        if not is_finite(layout, before):
            return None, 0.0
        aux = self._engine.aux(row.root, profile.references)
        runs = transcode(layout, before, block, profile, self._on_lane, aux)
        rank = min([block.fidelity, *(one.run.fidelity for one in runs)])
        smaller = replace(block, runs=tuple(one.run for one in runs), fidelity=rank)
        new = NewBlock(smaller, [buffer for one in runs for buffer in one.buffers])
        ready = make_ready(replace(smaller, namespace=record), new.buffers)
        if rank >= row.fidelity or ready.nbytes > row.blob_bytes - row.blob_bytes // SAVED_DIVISOR:
            return None, 0.0
        payload = BufferReader(ready.payload, [Range(0, 0, sum(map(len, ready.payload)))])
        after = self._decoded(layout, ready.block, payload)
        error = relative_error(layout, before, after, self._on_lane)
        return (new, error) if math.isfinite(error) else (None, 0.0)

    def _decoded(self, layout: Layout, block: Block, reader: RangeReader) -> EncodedRun:
        """The values of a block, as a hit gives them. Raises BlockCorruptError."""
        group, submit = [HitBlock(block.runs, block.n_tokens)], self._lane.submit_store
        aux = self._engine.aux(block.root, block.references)

        def views(layer: int) -> list[memoryview]:
            self._require_quiet()
            return decode_piece(submit, layout, layer, group, 0, reader, _not_told, aux, block.start).result()

        return gather_layers(layout, views, block.n_tokens)

    def _on_lane(self, work: Callable[[], T]) -> T:
        self._require_quiet()
        return self._lane.run_store(work)

    def _require_quiet(self) -> None:
        if self._quiet.is_disturbed() or self._is_over():
            raise _DisturbedError


def _not_told(nbytes: int, seconds: float) -> None:
    """No fetch waits for it."""
