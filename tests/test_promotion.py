"""What a promotion says when it ends early."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.core.blocks import BLOCK_TOKENS, FIDELITY_EXACT, Reason
from kvstore.core.breaker import Deadline
from kvstore.core.byte_budget import ByteBudget
from kvstore.core.limits import default_limits
from kvstore.remote import object_store
from kvstore.remote.object_names import Naming
from kvstore.remote.tier import RemoteTier
from kvstore.server.threads import Pool
from kvstore.server.tier.promotion import Promotion
from kvstore.server.tier.remote_watch import Watch
from tests.support.memory_objects import MemoryStore
from tests.support.remote_blobs import NS, blobs_of, chain_of, fill


class InlinePool:
    """A pool that runs work where it is asked for."""

    async def __call__(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    finish = __call__


class FullImporter:
    """Takes nothing, for this reason."""

    def __init__(self, reason: Reason) -> None:
        self.done = SimpleNamespace(blobs=0, reason=reason)
        self.closed = False

    def take(self, blob_bytes: int, data: memoryview) -> bool:
        return False

    def drop(self) -> None:
        pass

    def finish(self) -> Any:
        return self.done

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("reason", "said"),
    [(Reason.STORE_FULL, "no_room"), (Reason.NO_BASIS, "no_basis"), (Reason.EVICTED, "evicted")],
)
def test_what_is_not_stored_here_has_the_reason_of_the_store(reason: Reason, said: str) -> None:
    """And all memory is let go of."""
    store = MemoryStore()
    fill(store, blobs_of(2 * BLOCK_TOKENS))
    tier = RemoteTier(store, lambda item: None, None, default_limits(), sync=False)
    reach = tier.finder.find(chain_of(range(2 * BLOCK_TOKENS)), Naming(NS.info), ["exact"], Deadline(60))
    importer, buffers = FullImporter(reason), ByteBudget(1 << 30)

    async def promoted() -> str:
        made = Promotion(tier, Watch(tier), importer, buffers, FIDELITY_EXACT, InlinePool())  # type: ignore[arg-type]
        try:
            return await made.take(reach.blocks, Deadline(60))
        finally:
            await made.close()

    assert len(reach.blocks) == 2
    assert asyncio.run(promoted()) == said
    assert (buffers.used_bytes, importer.closed) == (0, True)


class HangingStore(MemoryStore):
    """Reads once it is let go on."""

    def __init__(self) -> None:
        super().__init__()
        self.is_reading, self.may_end = threading.Event(), threading.Event()

    def read_all(self, wanted: Any, deadline: Deadline) -> Any:
        self.is_reading.set()
        assert self.may_end.wait(60)
        return super().read_all(wanted, deadline)


class BusyImporter(FullImporter):
    """Takes bytes once it is let go on."""

    def __init__(self) -> None:
        super().__init__(Reason.STORE_FULL)
        self.is_taking, self.may_end = threading.Event(), threading.Event()
        self.closed_while_taking = False

    def take(self, blob_bytes: int, data: memoryview) -> bool:
        self.is_taking.set()
        assert self.may_end.wait(60)
        self.closed_while_taking = self.closed
        return False


@pytest.mark.parametrize("begun", ["reading", "storing"])
def test_what_a_cancelled_promotion_has_begun_ends_before_its_memory_is_free(begun: str) -> None:
    """A thread cannot be interrupted: it goes on with its buffers, and the importer is one thread's at a time."""
    store, importer, buffers = HangingStore(), BusyImporter(), ByteBudget(1 << 30)
    fill(store, blobs_of(2 * BLOCK_TOKENS))
    tier = RemoteTier(store, lambda item: None, None, default_limits(), sync=False)
    reach = tier.finder.find(chain_of(range(2 * BLOCK_TOKENS)), Naming(NS.info), ["exact"], Deadline(60))
    step = store if begun == "reading" else importer
    has_begun = store.is_reading if begun == "reading" else importer.is_taking
    (importer if begun == "reading" else store).may_end.set()

    async def cancelled() -> None:
        pool = Pool("remote", 2)
        made = Promotion(tier, Watch(tier), importer, buffers, FIDELITY_EXACT, pool)  # type: ignore[arg-type]
        taking = asyncio.ensure_future(made.take(reach.blocks, Deadline(60)))
        await asyncio.to_thread(has_begun.wait, 60)
        taking.cancel()
        await asyncio.wait([taking])
        closing = asyncio.ensure_future(made.close())
        await asyncio.wait([closing], timeout=0.2)
        held_bytes = buffers.used_bytes
        step.may_end.set()
        await closing
        await until(lambda: not buffers.used_bytes)
        pool.close()
        assert held_bytes == sum(one.head.nbytes for one in reach.blocks)

    asyncio.run(cancelled())
    assert importer.closed and not importer.closed_while_taking


async def until(is_so: Callable[[], bool]) -> None:
    """Wait until it is so."""
    async with asyncio.timeout(60):
        while not is_so():
            await asyncio.sleep(0.01)


class TakingImporter(FullImporter):
    """Takes everything, and keeps it."""

    def __init__(self) -> None:
        super().__init__(Reason.OK)
        self.blobs: list[bytearray] = []

    def take(self, blob_bytes: int, data: memoryview) -> bool:
        if blob_bytes:
            self.blobs.append(bytearray())
        self.blobs[-1] += data
        return True


@pytest.mark.parametrize("part_bytes", [64, 5000, 1 << 20])
def test_a_blob_that_is_read_in_ranges_is_stored_whole(part_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose header is longer than a range."""
    monkeypatch.setattr(object_store, "PART_BYTES", part_bytes)
    store, blobs = MemoryStore(), blobs_of(2 * BLOCK_TOKENS + 40)
    fill(store, blobs)
    tier = RemoteTier(store, lambda item: None, None, default_limits(), sync=False)
    reach = tier.finder.find(chain_of(range(2 * BLOCK_TOKENS + 40)), Naming(NS.info), ["exact"], Deadline(60))
    importer = TakingImporter()

    async def promoted() -> Promotion:
        made = Promotion(tier, Watch(tier), importer, ByteBudget(1 << 30), FIDELITY_EXACT, InlinePool())  # type: ignore[arg-type]
        assert await made.take(reach.blocks, Deadline(60)) is None
        await made.close()
        return made

    made = asyncio.run(promoted())
    assert [bytes(one) for one in importer.blobs] == [blob for _, blob in blobs]
    assert made.keys == [block.key for block, _ in blobs]
    assert made.read_bytes == sum(len(blob) for _, blob in blobs)
    assert tier.stats().requests.reads == sum(-(-len(blob) // part_bytes) for _, blob in blobs)
