"""What each hour brought: rows, their file, and what a restart, a kill or a damaged file leaves of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.telemetry.history import CODES_MAX, COLUMNS, FILE, HOUR_S, ROWS_MAX, History, Moment
from kvstore.telemetry.lifetime import WRITE_EVERY_S, Lifetime
from kvstore.telemetry.traffic import Totals, Who
from tests.support.clock import Clock

NOON_S = 1_700_002_800 // HOUR_S * HOUR_S
WHO = Who("worker", 7, bytes(32), "small-lm", "test 1")


def moment(hits: int, used_bytes: int = 1000, **reasons: int) -> Moment:
    """Counters since start."""
    totals = Totals(hits=hits, hit_tokens=100 * hits, saved_s=hits / 8)
    return Moment(totals, {"miss_reasons": reasons}, evicted_bytes=10 * hits, used_bytes=used_bytes)


def test_a_row_is_what_its_hour_added(tmp_path: Path) -> None:
    """Of counters since start; the last size of the disk; an hour without anything has no row."""
    history = History(tmp_path, sync=False, clock=(clock := Clock(NOON_S)))
    history.note(moment(2, evicted=1))
    clock.now_s += 60
    history.note(moment(3, used_bytes=2000, evicted=1, identity=4))
    clock.now_s += 3 * HOUR_S
    history.note(moment(3, used_bytes=2000, evicted=1, identity=4))
    history.note(moment(4, used_bytes=1500, evicted=1, identity=5))
    first, last = history.rows().values()
    assert list(history.rows()) == [NOON_S, NOON_S + 3 * HOUR_S]
    assert (first.totals.hits, first.totals.saved_s, first.used_bytes, first.evicted_bytes) == (3, 0.375, 2000, 30)
    assert (dict(first.reasons["miss_reasons"]), dict(last.reasons["miss_reasons"])) == (
        {"evicted": 1, "identity": 4},
        {"identity": 1},
    )
    assert (last.totals.hits, last.used_bytes, last.evicted_bytes) == (1, 1500, 10)


def test_a_moment_that_comes_late_counts_nothing(tmp_path: Path) -> None:
    """Two threads note: whoever was slower must not make the next difference larger."""
    history = History(tmp_path, sync=False, clock=Clock(NOON_S))
    for hits, changes in ((1, 1), (5, 5), (3, 3), (6, 6)):
        history.note(replace(moment(hits), changes=changes))
    (row,) = history.rows().values()
    assert row.totals.hits == 6


def test_the_file_is_replaced_once_an_hour_and_is_read_back(tmp_path: Path) -> None:
    """It has the hours that have ended; the one that is going on is the caller's to keep."""
    history = History(tmp_path, sync=False, clock=(clock := Clock(NOON_S)))
    history.note(moment(1, evicted=1))
    history.save()
    assert not (tmp_path / FILE).exists()
    clock.now_s += HOUR_S
    history.note(moment(3, evicted=1))
    history.save()
    written = (tmp_path / FILE).stat().st_mtime_ns
    history.save()
    assert (tmp_path / FILE).stat().st_mtime_ns == written and list(tmp_path.iterdir()) == [tmp_path / FILE]
    after = History(tmp_path, sync=False, clock=clock)
    after.restore(json.loads(json.dumps(history.open_row())))
    assert after.rows() == history.rows() and len(after.rows()) == 2
    after.note(moment(1))
    assert after.rows()[NOON_S + HOUR_S].totals.hits == 3, "a restart goes on in the hour"


def test_a_row_that_the_file_has_is_not_taken_back_from_an_older_note(tmp_path: Path) -> None:
    """A kill between the two files leaves the hour in both; the file has all of it."""
    history = History(tmp_path, sync=False, clock=(clock := Clock(NOON_S)))
    history.note(moment(1))
    early = history.open_row()
    history.note(moment(5))
    clock.now_s += HOUR_S
    history.save()
    after = History(tmp_path, sync=False, clock=clock)
    after.restore(early)
    assert after.rows()[NOON_S].totals.hits == 5


def test_the_history_is_bounded(tmp_path: Path) -> None:
    """90 days; and what a clock that was ahead has written goes when it is put right."""
    history = History(tmp_path, sync=False, clock=(clock := Clock(NOON_S)))
    for number in range(ROWS_MAX + 50):
        history.note(moment(number + 1, evicted=number, identity=number))
        clock.now_s += HOUR_S
    assert len(history.rows()) == ROWS_MAX
    history.save()
    assert (tmp_path / FILE).stat().st_size < 500_000
    clock.now_s -= 20 * 24 * HOUR_S
    history.note(moment(10_000))
    assert max(history.rows()) <= clock.now_s + HOUR_S
    clock.now_s += 400 * 24 * HOUR_S
    history.note(moment(10_001))
    assert len(history.rows()) == 1


GOOD = [NOON_S, *[0] * (len(COLUMNS) - 4), {}, {}, {}]
BAD_ROWS = [
    [],
    [1, *GOOD[1:]],
    [-HOUR_S, *GOOD[1:]],
    [*GOOD[:-1], 5],
    [*GOOD[:-1], {"evicted": -1}],
    [*GOOD[:-1], {"evicted": 10**30}],
    [*GOOD[:-4], 1 << 70, {}, {}, {}],
    [1e400, *GOOD[1:]],
    "row",
]


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_file_that_is_damaged_begins_anew(tmp_path: Path, row: object, caplog: pytest.LogCaptureFixture) -> None:
    """With a warning; the next hour replaces it."""
    (tmp_path / FILE).write_text(json.dumps({"version": 1, "columns": COLUMNS, "rows": [GOOD, row]}))
    history = History(tmp_path, sync=False, clock=(clock := Clock(NOON_S)))
    assert history.rows() == {} and "starts again" in caplog.text
    history.note(moment(1))
    clock.now_s += HOUR_S
    history.save()
    assert len(History(tmp_path, sync=False, clock=clock).rows()) == 1


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "{}", '{"version": 2}', '{"version": 1, "columns": [], "rows": []}']
)
def test_a_file_that_is_none_of_ours_begins_anew(tmp_path: Path, text: str) -> None:
    """Whatever is in it."""
    (tmp_path / FILE).write_text(text)
    assert History(tmp_path, sync=False).rows() == {}


def test_reasons_of_a_row_are_bounded(tmp_path: Path) -> None:
    """A file cannot make the daemon answer more than it would write."""
    many = {f"{number}{'x' * 100}": 1 for number in range(1000)}
    (tmp_path / FILE).write_text(json.dumps({"version": 1, "columns": COLUMNS, "rows": [[*GOOD[:-1], many]]}))
    (row,) = History(tmp_path, sync=False).rows().values()
    assert len(row.reasons["store_reasons"]) == CODES_MAX and max(map(len, row.reasons["store_reasons"])) <= 40


def test_the_hour_that_is_going_on_is_written_with_the_lifetime_once_a_minute(tmp_path: Path) -> None:
    """A kill loses at most a minute of it."""
    lifetime = Lifetime(tmp_path, sync=False, clock=(clock := Clock(0.0)))
    traffic = lifetime.traffic
    for second in range(3 * int(WRITE_EVERY_S)):
        traffic.count(WHO, Totals(hits=1))
        lifetime.keep(lambda known: Moment(known.since_start))
        (row,) = Lifetime(tmp_path, sync=False).history.rows().values()
        assert second + 1 - row.totals.hits <= WRITE_EVERY_S
        clock.now_s += 1
