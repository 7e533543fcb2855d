"""Durability `full`: what is answered as durable has left the drive's cache, whoever stored it."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.core.blocks import Reason
from kvstore.engine import Engine, Fs
from kvstore.engine.ledger import DriveCache
from tests.support.engine import find, namespace, options, put
from tests.test_store_path import TOKENS, Rig

NS = namespace()
PROMPT = list(range(600))
# Long enough that an answer that does not wait would have come; nothing is measured against it.
MOMENT_S = 0.3


class SlowDrive(Fs):
    """Empties its cache when it is let, or refuses."""

    def __init__(self) -> None:
        self.begun, self.let, self.count, self.broken = threading.Event(), threading.Event(), 0, False

    def flush_drive(self, path: str) -> None:
        self.count += 1
        self.begun.set()
        assert self.let.wait(60)
        if self.broken:
            raise OSError(errno.EIO, "the drive does not answer")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for callers that wait."""
    with ThreadPoolExecutor(4) as threads:
        yield threads


def test_a_second_store_of_the_same_prompt_waits_for_the_flush_of_the_first(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    """Its rows are visible, and are not yet promised: neither the same store again nor a plain question is answered."""
    drive = SlowDrive()
    with Engine.open(tmp_path / "data", options(durability="full"), drive) as engine:
        first = pool.submit(put, engine, NS, PROMPT)
        assert drive.begun.wait(60)
        assert find(engine, NS, PROMPT).n_tokens == len(PROMPT)
        others = [pool.submit(put, engine, NS, PROMPT), pool.submit(engine.await_durable)]
        with pytest.raises(TimeoutError):
            others[0].result(MOMENT_S)
        assert not others[1].done()
        drive.let.set()
        assert first.result(60).reason is Reason.OK
        assert others[0].result(60).blocks == 3
        assert others[1].result(60) is True


def test_already_stored_is_answered_after_the_flush(
    tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the daemon's own planning of a store."""
    drive = SlowDrive()
    monkeypatch.setattr(Fs, "flush_drive", lambda self, path: drive.flush_drive(path))
    rig = Rig(tmp_path / "data", durability="full")
    try:
        first = pool.submit(rig.store, TOKENS[:256])
        assert drive.begun.wait(60)
        second = pool.submit(rig.begin, TOKENS[:256])
        with pytest.raises(TimeoutError):
            second.result(MOMENT_S)
        drive.let.set()
        assert second.result(60).reason is Reason.ALREADY_STORED
        assert first.result(60).durable
    finally:
        drive.let.set()
        rig.close()


def test_a_flush_that_fails_is_not_taken_for_durable(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """Neither by the store that asked for it nor by one that waited; the next flush covers both."""
    drive = SlowDrive()
    drive.let.set()
    drive.broken = True
    with Engine.open(tmp_path / "data", options(durability="full"), drive) as engine:
        assert put(engine, NS, PROMPT).reason is Reason.STORE_FULL
        assert engine.await_durable() is False
        drive.broken = False
        assert engine.await_durable() is True
        flushes = drive.count
        assert engine.await_durable() is True
        assert drive.count == flushes


def test_waiters_share_one_flush(pool: ThreadPoolExecutor) -> None:
    """Ten that ask while the cache is being emptied cost one more flush, not ten."""
    drive = SlowDrive()
    cache = DriveCache(lambda: drive.flush_drive(""))
    with cache.committing():
        pass
    first = pool.submit(cache.wait)
    assert drive.begun.wait(60)
    with cache.committing():
        pass
    others = [threading.Thread(target=cache.wait) for _ in range(10)]
    for other in others:
        other.start()
    drive.let.set()
    first.result(60)
    for other in others:
        other.join(60)
        assert not other.is_alive()
    assert drive.count == 2
