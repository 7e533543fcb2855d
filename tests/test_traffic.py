"""What requests got, by scope; and the lifetime that outlives a daemon."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstore.telemetry.history import Moment
from kvstore.telemetry.lifetime import FILE, WRITE_EVERY_S, Lifetime
from kvstore.telemetry.traffic import (
    LABELS_MAX,
    NAMESPACES_MAX,
    OTHER,
    NamespaceTraffic,
    Snapshot,
    Totals,
    Traffic,
    Who,
)
from tests.support.clock import Clock

ROOT = bytes(32)


def who(root: bytes = ROOT, caller: str = "worker") -> Who:
    """A worker."""
    return Who(caller, 7, root, "small-lm", "test 1")


def moment(known: Snapshot) -> Moment:
    """What the history notes."""
    return Moment(known.since_start)


def test_a_hit_counts_in_every_scope() -> None:
    """Since start, in the last hour, in all, for its namespace and for its session."""
    traffic = Traffic(Clock(1_700_000_000.0))
    traffic.count(who(), Totals(hits=1, prompt_tokens=100, hit_tokens=99))
    found = traffic.snapshot()
    (session,) = found.sessions
    scopes = (found.since_start, found.last_hour, found.lifetime, found.namespaces[ROOT].totals, session.totals)
    assert all((one.hits, one.prompt_tokens, one.hit_tokens) == (1, 100, 99) for one in scopes)
    assert session.last_hit_s == session.last_s == 1_700_000_000


def test_the_last_hour_forgets_and_the_others_do_not() -> None:
    """By whole minutes."""
    clock = Clock(1_700_000_000.0)
    traffic = Traffic(clock)
    for _ in range(90):
        traffic.count(who(), Totals(hits=1))
        clock.now_s += 60
    assert traffic.snapshot().since_start.hits == 90
    assert 59 <= traffic.snapshot().last_hour.hits <= 60
    clock.now_s += 7200
    assert traffic.snapshot().last_hour.hits == 0


def test_labels_are_the_first_namespaces_for_good_and_the_rest_is_one() -> None:
    """So that no counter that is scraped goes back; together they are what was counted since start."""
    traffic = Traffic(Clock(1_700_000_000.0))
    for _ in range(2):
        for number in range(3 * LABELS_MAX):
            traffic.count(who(number.to_bytes(32, "big")), Totals(hits=1))
    labelled = traffic.snapshot().labelled
    assert len(labelled) == LABELS_MAX and labelled[-1].root == OTHER
    assert [one.totals.hits for one in labelled] == [2] * (LABELS_MAX - 1) + [2 * (2 * LABELS_MAX + 1)]
    assert sum(one.totals.hits for one in labelled) == traffic.snapshot().since_start.hits


def test_namespaces_and_sessions_are_bounded() -> None:
    """Whoever names many displaces those that were used least recently."""
    traffic = Traffic(Clock(1_700_000_000.0))
    for number in range(NAMESPACES_MAX + 10):
        traffic.count(who(number.to_bytes(32, "big"), str(number)), Totals(hits=1))
    assert len(traffic.snapshot().namespaces) == NAMESPACES_MAX
    assert traffic.snapshot().since_start.hits == NAMESPACES_MAX + 10


def test_saved_seconds_take_the_measured_speed_less_what_restoring_took() -> None:
    """Nothing where the speed is not known, or where restoring took longer."""
    traffic = Traffic(Clock(1_700_000_000.0))
    assert traffic.saved_s(ROOT, 1000, 1.0) == 0
    traffic.computes(ROOT, 100.0)
    assert traffic.saved_s(ROOT, 1000, 1.0) == 9.0
    assert traffic.saved_s(ROOT, 10, 1.0) == 0


def test_reused_bytes_are_estimated_from_what_was_written() -> None:
    """At the bytes a token that the namespace came to on disk."""
    traffic = Traffic(Clock(1_700_000_000.0))
    assert traffic.reused_bytes(ROOT, 100) == 0
    traffic.count(who(), Totals(stores=1, stored_tokens=100, written_bytes=5000))
    assert traffic.reused_bytes(ROOT, 30) == 1500


def test_a_restart_goes_on_from_the_lifetime(tmp_path: Path) -> None:
    """Also with the namespaces and their speed; since start begins at zero."""
    before = Lifetime(tmp_path, sync=False)
    before.traffic.count(who(), Totals(hits=2, saved_s=1.5))
    before.traffic.computes(ROOT, 250.0)
    before.keep(moment, now=True)
    after = Lifetime(tmp_path, sync=False).traffic
    after.count(who(), Totals(hits=1))
    found = after.snapshot()
    assert (found.lifetime.hits, found.lifetime.saved_s, found.since_start.hits) == (3, 1.5, 1)
    assert found.namespaces[ROOT] == NamespaceTraffic(Totals(hits=3, saved_s=1.5), 250.0)
    assert found.lifetime_since_s == before.traffic.snapshot().lifetime_since_s


def test_a_kill_loses_at_most_a_minute(tmp_path: Path) -> None:
    """Changes are written within a minute of the last write, and nothing is when nothing changed."""
    clock = Clock(0.0)
    lifetime = Lifetime(tmp_path, sync=False, clock=clock)
    lifetime.keep(moment)
    assert not (tmp_path / FILE).exists()
    for _ in range(3 * int(WRITE_EVERY_S)):
        lifetime.traffic.count(who(), Totals(hits=1))
        lifetime.keep(moment)
        written = json.loads((tmp_path / FILE).read_bytes())["total"]["hits"]
        assert lifetime.traffic.snapshot().lifetime.hits - written <= WRITE_EVERY_S
        clock.now_s += 1
    assert list(tmp_path.iterdir()) == [tmp_path / FILE]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 2, "total": {"hits": "x"}}'])
def test_a_file_that_is_none_of_ours_begins_anew(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    """With a warning, and is replaced."""
    (tmp_path / FILE).write_text(text)
    lifetime = Lifetime(tmp_path, sync=False)
    assert lifetime.traffic.snapshot().lifetime == Totals() and "start at 0" in caplog.text
    lifetime.traffic.count(who(), Totals(hits=1))
    lifetime.keep(moment, now=True)
    assert Lifetime(tmp_path, sync=False).traffic.snapshot().lifetime.hits == 1


def test_a_disk_that_refuses_costs_nothing_but_the_counters(tmp_path: Path) -> None:
    """It is tried again a minute later."""
    lifetime = Lifetime(tmp_path / "gone", sync=False, clock=(clock := Clock(0.0)))
    lifetime.traffic.count(who(), Totals(hits=1))
    lifetime.keep(moment)
    (tmp_path / "gone").mkdir()
    clock.now_s += WRITE_EVERY_S
    lifetime.keep(moment)
    assert Lifetime(tmp_path / "gone").traffic.snapshot().lifetime.hits == 1
