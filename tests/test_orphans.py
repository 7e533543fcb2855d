"""Namespaces whose identity is no longer in use: listed as orphans with their bytes, and evicted as such."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.engine import Engine, Selection
from kvstore.engine.types import ORPHAN_S
from tests.support.engine import find, namespace, options, put

NS, OTHER = namespace(), namespace("other weights")
DAY_S = 86_400.0


class Clock:
    """Wall clock of the tests."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    """Stands until it is moved."""
    return Clock()


def orphans(engine: Engine) -> dict[bytes, int]:
    """Bytes by namespace."""
    return {one.info.root: one.disk_bytes for one in engine.stats().namespaces if one.orphaned}


def test_a_namespace_that_no_caller_names_becomes_an_orphan_and_one_that_is_asked_for_does_not(
    tmp_path: Path, clock: Clock
) -> None:
    """Also when what is asked for is not there; and it is remembered across restarts."""
    with Engine.open(tmp_path / "data", options(), clock=clock) as engine:
        put(engine, NS, list(range(300)))
        put(engine, OTHER, list(range(300)))
        clock.now_s += ORPHAN_S - DAY_S
        assert find(engine, NS, [7, 7, 7]).n_tokens == 0
        engine.maintain()
    clock.now_s += 2 * DAY_S
    with Engine.open(tmp_path / "data", options(), clock=clock) as engine:
        assert set(orphans(engine)) == {OTHER.root} and orphans(engine)[OTHER.root] > 0
        find(engine, OTHER, list(range(300)))
        engine.maintain()
        clock.now_s += 40.0
        engine.maintain()
        assert orphans(engine) == {}


def test_orphans_are_evicted_and_nothing_else(tmp_path: Path, clock: Clock) -> None:
    """A dry run tells the same bytes."""
    with Engine.open(tmp_path / "data", options(), clock=clock) as engine:
        put(engine, OTHER, list(range(300)))
        clock.now_s += ORPHAN_S + DAY_S
        put(engine, NS, list(range(300)))
        expected = orphans(engine)[OTHER.root]
        told = engine.evict(Selection(orphans=True), dry_run=True)
        report = engine.evict(Selection(orphans=True))
        assert (told.blocks, told.freed_bytes) == (report.blocks, report.freed_bytes) == (2, expected)
        assert [one.info.root for one in engine.stats().namespaces] == [NS.root]
        assert engine.evict(Selection(orphans=True)).blocks == 0
