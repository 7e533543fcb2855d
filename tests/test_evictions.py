"""Every deletion that no user asked for leaves a trace: a line in the log, a counter by cause."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from kvstore.blobs.protocol import Room
from kvstore.core.blocks import Reason
from kvstore.engine import Engine, Fs, Selection
from tests.support.engine import HYBRID, blob_path, find, namespace, options, put, put_checkpoint

NS, OTHER = namespace(), namespace("other", HYBRID)


class Volume(Fs):
    """A volume of which the test says what is free."""

    def __init__(self) -> None:
        self.free, self.names = 1 << 40, 1 << 20

    def room(self, path: str) -> Room:
        """As set."""
        return Room(self.free, self.names)


def fill(engine: Engine, n_prompts: int = 20) -> None:
    """Prompts of one block each."""
    for number in range(n_prompts):
        put(engine, NS, [number * 1000, *range(255)])


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    """What was logged at a level since the last call."""
    found = [record.getMessage() for record in caplog.records if record.levelno == level]
    caplog.clear()
    return found


def test_a_start_with_a_lower_budget_says_what_it_is_about_to_delete_and_what_it_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """WARN before anything goes, one line with cause, blocks and bytes after it, and the counters agree."""
    caplog.set_level(logging.INFO)
    with Engine.open(tmp_path / "data", options()) as engine:
        fill(engine)
        budget = engine.used_bytes - 10 * 12288
    caplog.clear()
    with Engine.open(tmp_path / "data", options(budget_bytes=budget)) as engine:
        [warned] = lines(caplog, logging.WARNING)
        assert "about to delete" in warned and "(budget)" in warned and " kB of " in warned
        blocks, nbytes = engine.stats().evictions["budget"]
        assert blocks == 20 - engine.stats().blobs > 5
        assert nbytes == blocks * 12288
        engine.maintain()
    with Engine.open(tmp_path / "data", options(budget_bytes=budget)):
        assert lines(caplog, logging.WARNING) == []


def test_a_small_correction_at_start_is_told_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line with the cause at INFO."""
    caplog.set_level(logging.INFO)
    with Engine.open(tmp_path / "data", options()) as engine:
        fill(engine, 40)
        used = engine.used_bytes
        caplog.clear()
        engine.limit(used - 4096, 0)
        assert [line for line in lines(caplog, logging.INFO) if line.startswith("evicted ") and " budget:" in line]
        assert lines(caplog, logging.WARNING) == []


def test_every_cause_has_its_counter(tmp_path: Path) -> None:
    """Asked for, over the budget, under the floor, redundant, damaged."""
    volume = Volume()
    with Engine.open(tmp_path / "data", options(), volume) as engine:
        fill(engine, 10)
        engine.evict(Selection(bytes=1))
        put(engine, OTHER, range(600))
        for length in (500, 520, 540, 560):
            put_checkpoint(engine, OTHER, range(length))
        row = find(engine, OTHER, range(600)).slices[-1].row
        path = blob_path(engine, row)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        engine.recheck(row.key)
        volume.free = 0
        engine.limit(1 << 30, 8192)
        volume.free = 1 << 40
        engine.limit(engine.used_bytes - 4096, 0)
        evictions = engine.stats().evictions
    assert set(evictions) == {"asked", "chain", "repair", "floor", "budget"}
    assert all(blocks > 0 and nbytes > 0 for blocks, nbytes in evictions.values())


def test_the_floor_is_told_at_the_start_and_at_each_transition(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """WARN when the store turns itself off, INFO when it takes stores again; sizes in GB; nothing in between."""
    caplog.set_level(logging.INFO)
    volume = Volume()
    with Engine.open(tmp_path / "data", options(), volume) as engine:
        fill(engine)
    volume.free = 5_000_000_000
    with Engine.open(tmp_path / "data", options(free_floor_bytes=20_000_000_000), volume) as engine:
        warned = [line for line in lines(caplog, logging.WARNING) if "nothing is stored" in line]
        assert warned and "5.0 GB" in warned[0] and "20.0 GB" in warned[0]
        assert "20.0 GB" in engine.stats().degraded
        engine.maintain()
        engine.maintain()
        assert lines(caplog, logging.WARNING) == []
        volume.free = 50_000_000_000
        engine.maintain()
        assert [line for line in lines(caplog, logging.INFO) if "taken again" in line]
        assert engine.stats().degraded == ""
        volume.free = 5_000_000_000
        engine.maintain()
        assert len(lines(caplog, logging.WARNING)) == 1


def test_without_inodes_stores_are_refused_with_the_reason_and_taken_again_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes are free, but no file can be made."""
    volume = Volume()
    with Engine.open(tmp_path / "data", options(), volume) as engine:
        volume.names = 0
        engine.maintain()
        assert "inodes" in engine.stats().degraded
        assert put(engine, NS, range(300)).reason is Reason.STORE_FULL
        assert len([line for line in lines(caplog, logging.WARNING) if "inodes" in line]) == 1
        volume.names = 1 << 20
        engine.maintain()
        assert engine.stats().degraded == ""
        assert put(engine, NS, range(300)).reason is Reason.OK


def test_a_refused_upload_says_the_volume_is_short_until_one_of_its_size_fits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The volume has something left, but less than a store needs: a line at each transition, none in between."""
    caplog.set_level(logging.INFO)
    volume = Volume()
    volume.free = 1_100_000
    with Engine.open(tmp_path / "data", options(free_floor_bytes=1_000_000), volume) as engine:
        assert engine.could_make_room(50_000) and not engine.could_make_room(10_000_000)
        assert "free some" in engine.degraded
        for volume.free in (1_100_000, 9_000_000):
            engine.maintain()
            assert not engine.could_make_room(10_000_000) and "free some" in engine.degraded
        assert len([line for line in lines(caplog, logging.WARNING) if "nothing is stored" in line]) == 1
        volume.free = 20_000_000
        engine.maintain()
        assert engine.degraded == "" and engine.could_make_room(10_000_000)
        assert [line for line in lines(caplog, logging.INFO) if "taken again" in line]


def test_an_upload_that_is_too_large_for_the_budget_is_refused_and_nothing_is_degraded(tmp_path: Path) -> None:
    """The next one may be smaller."""
    with Engine.open(tmp_path / "data", options(budget_bytes=10_000_000), Volume()) as engine:
        assert not engine.could_make_room(20_000_000) and engine.degraded == ""


def test_a_budget_that_the_index_and_the_quarantine_take_is_said(tmp_path: Path) -> None:
    """No eviction frees that, so stores of a usual size are refused until there is room again."""
    with Engine.open(tmp_path / "data", options(budget_bytes=10_000_000), Volume()) as engine:
        engine._shared.ledger.set("quarantine", 9_000_000)
        assert not engine.could_make_room(2_000_000) and "quarantine" in engine.degraded
        engine.maintain()
        assert "raise budget_bytes" in engine.degraded
        engine._shared.ledger.set("quarantine", 0)
        engine.maintain()
        assert engine.degraded == ""
