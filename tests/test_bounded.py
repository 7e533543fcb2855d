"""The table of the entries that were set last, and the byte budget that queues and buffers share."""

from __future__ import annotations

import threading
import time

import pytest

from kvstore.core.bounded import Bounded
from kvstore.core.byte_budget import ByteBudget


def test_what_is_set_again_outlives_what_was_set_before() -> None:
    """The oldest goes when there is one too many; reading makes nothing newer."""
    table: Bounded[str, int] = Bounded(2)
    for key in ("a", "b", "a"):
        table[key] = len(table)
    assert table["b"] == 1
    table["c"] = 3
    assert list(table.items()) == [("a", 2), ("c", 3)]


def test_what_is_acquired_counts_until_it_is_released() -> None:
    """The sum of what is held never exceeds the limit."""
    budget = ByteBudget(10)
    assert budget.try_acquire(6)
    assert not budget.try_acquire(5)
    assert budget.try_acquire(4)
    assert (budget.used_bytes, budget.limit_bytes) == (10, 10)
    budget.release(6)
    assert budget.used_bytes == 4
    assert budget.try_acquire(6)


def test_more_than_the_limit_is_refused_without_waiting() -> None:
    """No release could ever make room for it."""
    started = time.monotonic()
    assert not ByteBudget(10).acquire(11, timeout_s=60)
    assert time.monotonic() - started < 30


def test_waiting_ends_when_room_is_made() -> None:
    """A release by another thread wakes whoever waits."""
    budget = ByteBudget(10)
    assert budget.try_acquire(10)
    timer = threading.Timer(0.05, budget.release, [10])
    timer.start()
    assert budget.acquire(10, timeout_s=60)
    timer.join()
    assert budget.used_bytes == 10


def test_waiting_ends_at_the_timeout() -> None:
    """Nobody waits for ever for a budget that stays full."""
    budget = ByteBudget(1)
    assert budget.try_acquire(1)
    started = time.monotonic()
    assert not budget.acquire(1, timeout_s=0.05)
    assert time.monotonic() - started > 0.04
    assert budget.used_bytes == 1


def test_releasing_what_was_never_acquired_is_a_bug() -> None:
    """It would let the process hold more than its bound."""
    budget = ByteBudget(10)
    with pytest.raises(ValueError, match="release of 1 bytes while 0 are held"):
        budget.release(1)
    for bad in (lambda: budget.release(-1), lambda: budget.try_acquire(-1), lambda: ByteBudget(-1)):
        with pytest.raises(ValueError):
            bad()


def test_many_threads_never_hold_more_than_the_limit() -> None:
    """Acquire and release are atomic."""
    budget = ByteBudget(3)
    seen: list[int] = []

    def work() -> None:
        for _ in range(200):
            assert budget.acquire(1, timeout_s=10)
            seen.append(budget.used_bytes)
            budget.release(1)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(seen) <= 3
    assert budget.used_bytes == 0
