"""Deadlines, the watchdog over a stream, and the circuit breaker."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from kvstore.core.breaker import CircuitBreaker, Deadline, Watchdog
from kvstore.errors import DeadlineError
from tests.support.clock import Clock


def broken(clock: Clock) -> CircuitBreaker:
    """A breaker whose circuit has just opened."""
    breaker = CircuitBreaker(clock=clock)
    for _ in range(3):
        assert breaker.allow()
        breaker.failed()
    return breaker


def test_three_failures_in_a_row_open_the_circuit() -> None:
    """Two do not, and a success in between starts the count again."""
    breaker = CircuitBreaker(clock=Clock())
    for _ in range(2):
        breaker.failed()
        breaker.failed()
        assert breaker.allow()
        breaker.succeeded()
    for _ in range(3):
        breaker.failed()
    assert breaker.is_open
    assert not breaker.allow()


def test_one_trial_is_let_through_when_the_time_is_over() -> None:
    """Whoever comes while the trial is under way is refused."""
    clock = Clock()
    breaker = broken(clock)
    clock.now_s += 0.99
    assert not breaker.allow()
    clock.now_s += 0.02
    assert not breaker.is_open
    assert breaker.allow()
    assert not breaker.allow()
    breaker.succeeded()
    assert breaker.allow()
    assert breaker.allow()


def test_each_failed_trial_doubles_the_time_up_to_thirty_seconds() -> None:
    """1, 2, 4, 8, 16, 30, 30; a success starts at 1 again."""
    clock = Clock()
    breaker = broken(clock)
    for open_s in (1, 2, 4, 8, 16, 30, 30):
        clock.now_s += open_s - 0.01
        assert not breaker.allow()
        clock.now_s += 0.02
        assert breaker.allow()
        breaker.failed()
    clock.now_s += 31
    assert breaker.allow()
    breaker.succeeded()
    for _ in range(3):
        breaker.failed()
    clock.now_s += 1.01
    assert breaker.allow()


def test_calls_that_fail_late_do_not_lengthen_the_time() -> None:
    """Eight workers whose calls die together are one outage, not eight."""
    clock = Clock()
    breaker = broken(clock)
    for _ in range(5):
        breaker.failed()
    clock.now_s += 1.01
    assert breaker.allow()


def test_a_trial_that_never_reports_is_followed_by_another() -> None:
    """Its thread may have been interrupted."""
    clock = Clock()
    breaker = broken(clock)
    clock.now_s += 1.01
    assert breaker.allow()
    clock.now_s += 1.01
    assert breaker.allow()


def test_a_deadline_that_has_passed_raises() -> None:
    """The message names the limit."""
    deadline = Deadline(60.0)
    assert 0 < deadline.left_s <= 60.0
    deadline.check()
    deadline = Deadline(0.02)
    time.sleep(0.03)
    assert deadline.left_s == 0
    with pytest.raises(DeadlineError, match="20 ms"):
        deadline.check()


class Stream:
    """Messages after pauses; `cancel` ends the pause in progress."""

    def __init__(self, *pauses_s: float) -> None:
        self._pauses_s = pauses_s
        self.cancelled = threading.Event()

    def __iter__(self) -> Iterator[int]:
        for number, pause_s in enumerate(self._pauses_s):
            if self.cancelled.wait(pause_s):
                return
            yield number


def test_the_watchdog_cancels_a_wait_that_lasts_too_long() -> None:
    """Not much later than the limit, whichever message it is."""
    stream = Stream(0.0, 0.0, 60.0)
    messages = iter(stream)
    with Watchdog(stream.cancelled.set, 0.1) as watchdog:
        assert [watchdog.next(messages), watchdog.next(messages)] == [0, 1]
        time.sleep(0.15)
        started = time.monotonic()
        assert watchdog.next(messages) is None
        assert 0.09 < time.monotonic() - started < 10
        assert watchdog.fired


def test_the_watchdog_does_not_count_the_time_between_waits() -> None:
    """A caller that is slow to use a message has a daemon that is on time."""
    while (got := used_slowly(0.5)) is None:
        pass
    assert got == [0, 1, 2, 3, None]


def used_slowly(stall_s: float) -> list[int | None] | None:
    """What comes to a caller that takes longer than that; None where the machine held up one of the waits as long."""
    stream, longest_s = Stream(0.0, 0.03, 0.03, 0.0), 0.0
    messages, got = iter(stream), list[int | None]()
    with Watchdog(stream.cancelled.set, stall_s) as watchdog:
        for number in range(5):
            started_s = time.monotonic()
            got.append(watchdog.next(messages))
            longest_s = max(longest_s, time.monotonic() - started_s)
            time.sleep(1.5 * stall_s if number == 1 else 0.0)
        return None if watchdog.fired and longest_s > 0.9 * stall_s else got


def test_a_watchdog_that_looks_late_does_not_cancel_a_wait_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread may be held up between reading when the wait is over and reading the time."""
    plain, looked, ended = time.monotonic, threading.Event(), threading.Event()

    def late() -> float:
        if threading.current_thread().name != "kvstore-watchdog":
            return plain()
        looked.set()
        ended.wait(60)
        return plain() + 60

    def messages() -> Iterator[int]:
        assert looked.wait(60)
        yield 1

    monkeypatch.setattr(time, "monotonic", late)
    with Watchdog(lambda: None, 0.01) as watchdog:
        assert watchdog.next(messages()) == 1
        ended.set()
    assert not watchdog.fired


def test_the_watchdog_leaves_no_thread_behind() -> None:
    """It ends with its block, at once."""
    started = time.monotonic()
    with Watchdog(lambda: None, 30.0):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "kvstore-watchdog"]
    assert time.monotonic() - started < 15
