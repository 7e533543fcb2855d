"""The lane: one thread or two, fetches before stores, nothing waits forever."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest

from kvstore.core.thread_priority import BACKGROUND_NICE
from kvstore.errors import LimitError, UnavailableError
from kvstore.server import lane as lane_module
from kvstore.server.lane import Lane


@pytest.fixture
def blocked_lane() -> tuple[Lane, threading.Event]:
    """A lane whose first piece waits for the event."""
    lane, gate, started = Lane(), threading.Event(), threading.Event()
    lane.submit_fetch(lambda: started.set() or gate.wait())
    started.wait(60)
    return lane, gate


def test_fetches_go_before_stores_that_came_first(blocked_lane: tuple[Lane, threading.Event]) -> None:
    """A person waits for a fetch; nobody waits for a store."""
    lane, gate = blocked_lane
    order: list[str] = []
    futures = [lane.submit_store(lambda: order.append("store")), lane.submit_fetch(lambda: order.append("fetch"))]
    gate.set()
    for future in futures:
        future.result(60)
    assert order == ["fetch", "store"]
    lane.close()


def test_an_old_store_goes_before_a_new_fetch(
    blocked_lane: tuple[Lane, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stores age, so a stream of fetches cannot starve them."""
    lane, gate = blocked_lane
    monkeypatch.setattr(lane_module, "STORE_HANDICAP_S", 0.01)
    order: list[str] = []
    first = lane.submit_store(lambda: order.append("store"))
    time.sleep(0.05)
    second = lane.submit_fetch(lambda: order.append("fetch"))
    gate.set()
    first.result(60), second.result(60)
    assert order == ["store", "fetch"]
    lane.close()


def test_all_work_runs_on_one_thread_that_was_prepared_once() -> None:
    """MLX arrays belong to a thread; limits are set before the first piece."""
    starts: list[int] = []
    lane = Lane(lambda: starts.append(threading.get_ident()))
    assert not lane.used and not starts
    threads = {lane.submit_fetch(threading.get_ident).result(60) for _ in range(5)}
    assert threads == set(starts) and len(starts) == 1 and lane.used
    lane.close()


def test_an_error_reaches_the_caller_and_the_lane_lives_on() -> None:
    """One bad block must not stop the daemon's device work."""
    lane = Lane()
    with pytest.raises(ZeroDivisionError):
        lane.submit_fetch(lambda: 1 // 0).result(60)
    assert lane.submit_fetch(lambda: 2).result(60) == 2
    lane.close()


def test_the_queue_is_bounded_and_closing_cancels_what_waits(blocked_lane: tuple[Lane, threading.Event]) -> None:
    """More than the limit is refused at once, and nobody waits on a closed lane."""
    lane, gate = blocked_lane
    waiting = [lane.submit_store(int) for _ in range(lane_module.QUEUE_MAX)]
    with pytest.raises(LimitError):
        lane.submit_fetch(int)
    closer = threading.Thread(target=lane.close)
    closer.start()
    while not waiting[-1].cancelled():
        time.sleep(0.01)
    gate.set()
    closer.join(60)
    with pytest.raises(UnavailableError):
        lane.submit_fetch(int)


def test_what_mlx_keeps_goes_back_once_when_nothing_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the lane's thread, after work and not before any; a second time only after more work."""
    monkeypatch.setattr(lane_module, "IDLE_S", 0.02)
    released: list[int] = []
    lane = Lane(idle=lambda: released.append(threading.get_ident()))
    time.sleep(0.1)
    assert not released
    for count in (1, 2):
        thread = lane.submit_fetch(threading.get_ident).result(60)
        deadline = time.monotonic() + 120
        while len(released) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert released == [thread] * count
    lane.close()


def test_the_backlog_is_the_pieces_ahead_of_a_fetch(blocked_lane: tuple[Lane, threading.Event]) -> None:
    """Stores that just came are not: a fetch goes before them."""
    lane, gate = blocked_lane
    assert lane.backlog_s == 0.0, "no piece has ended yet"
    lane._fetches._piece_s = 0.5
    assert lane.backlog_s == 0.5
    fetches = [lane.submit_fetch(int) for _ in range(3)]
    lane.submit_store(int)
    assert lane.backlog_s == 2.0
    gate.set()
    for future in fetches:
        future.result(60)
    lane.close()
    assert lane.backlog_s == 0.0


def test_apart_a_fetch_does_not_wait_for_a_store_which_gives_way() -> None:
    """Two threads, each prepared once; that of the stores is the one with the lower priority."""
    prepared: list[int] = []
    gate, started = threading.Event(), threading.Event()
    lane = Lane(lambda: prepared.append(threading.get_ident()), two_threads=True)
    store = lane.submit_store(lambda: started.set() or (gate.wait(60) and _niceness()))
    assert started.wait(60)
    assert lane.backlog_s == 0.0
    assert lane.submit_fetch(_niceness).result(60) == _niceness()
    gate.set()
    assert store.result(60) == max(_niceness(), BACKGROUND_NICE) or sys.platform != "linux"
    assert len(set(prepared)) == len(prepared) == 2
    lane.close()


def test_apart_nothing_is_given_back_while_the_other_thread_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX would wait for the piece, and the whole daemon with it."""
    monkeypatch.setattr(lane_module, "IDLE_S", 0.02)
    gate, released = threading.Event(), threading.Event()
    lane = Lane(idle=released.set, two_threads=True)
    store = lane.submit_store(lambda: gate.wait(60))
    lane.submit_fetch(int).result(60)
    assert not released.wait(0.2)
    gate.set()
    store.result(60)
    assert released.wait(60), "whoever ends last gives it back"
    lane.close()


def _niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) if sys.platform == "linux" else 0
