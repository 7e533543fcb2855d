"""Whole namespaces: listed as orphans when no caller uses them any more, and evicted by one rename."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.core.blocks import Reason
from kvstore.engine import Engine, NewBlock, Selection
from kvstore.engine.evictions import MARKS_MAX, Evictions
from kvstore.engine.shared import ORPHAN_S
from tests.support.clock import Clock
from tests.support.engine import (
    RecordingFs,
    Stopped,
    StoppingFs,
    blob_paths,
    find,
    namespace,
    options,
    put,
    require_sound,
    sequence,
)

NS, OTHER = namespace(), namespace("other weights")
DAY_S = 86_400.0


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


def test_when_a_namespace_was_last_named_is_told_to_the_second_also_after_a_restart(
    tmp_path: Path, clock: Clock
) -> None:
    """Which of them is the latest decides where a prompt is looked up that names none."""

    def told(engine: Engine) -> dict[bytes, int]:
        return {one.info.root: one.used_s for one in engine.stats().namespaces}

    with Engine.open(tmp_path / "data", options(), clock=clock) as engine:
        expected = {}
        for ns in (NS, OTHER, NS):
            put(engine, ns, list(range(300)))
            clock.now_s += 60.0
            assert find(engine, ns, [7, 7, 7]).n_tokens == 0
            expected[ns.root] = int(clock.now_s)
        assert told(engine) == expected
        assert [info.root for info in engine.nearest.namespaces(9, readable=True)] == [NS.root, OTHER.root]
    with Engine.open(tmp_path / "data", options(), clock=clock) as engine:
        assert told(engine) == expected


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


@pytest.mark.parametrize("how", ["stored again after an eviction", "the index is lost"])
def test_a_namespace_that_is_new_in_the_index_is_no_orphan_and_its_blocks_do_not_expire(
    tmp_path: Path, clock: Clock, how: str
) -> None:
    """When it was last named is known on the first day; when it is not known, it is now."""
    with Engine.open(tmp_path / "data", options(), clock=clock) as engine:
        put(engine, NS, list(range(300)))
        if how == "stored again after an eviction":
            engine.evict(Selection(all=True))
            put(engine, NS, list(range(300)))
        else:
            clock.now_s += ORPHAN_S + DAY_S
    if how == "the index is lost":
        shutil.rmtree(tmp_path / "data" / "index")
    with Engine.open(tmp_path / "data", options(ttl_s=int(DAY_S)), clock=clock) as engine:
        assert orphans(engine) == {}
        assert engine.evict(Selection(orphans=True)).blocks == 0
        engine.maintain()
        assert find(engine, NS, [*range(300), 7]).n_tokens == 300


def test_a_clock_that_is_set_only_after_boot_expires_nothing_that_was_used_before(tmp_path: Path, clock: Clock) -> None:
    """1971 for a while, with hits of one namespace; then the year that it is."""
    place = tmp_path / "stored"
    for moment_s in (clock.now_s, 400 * DAY_S, clock.now_s + 60):
        clock.now_s = moment_s
        with Engine.open(tmp_path / "data", options(ttl_s=int(DAY_S)), clock=clock) as engine:
            if not place.exists():
                place.touch()
                put(engine, NS, list(range(300)))
                put(engine, OTHER, list(range(300)))
            engine.maintain()
            match = find(engine, NS, [*range(300), 7])
            assert match.n_tokens == find(engine, OTHER, [*range(300), 7]).n_tokens == 300
            engine.touch(match.slices)
            clock.now_s += 3600
            engine.maintain()
            assert orphans(engine) == {}


def test_a_namespace_is_evicted_by_one_rename_however_many_blobs_it_has(tmp_path: Path) -> None:
    """A commit, a rename, a synced folder; then the unlinks; nothing of it returns when the index is lost."""
    fs = RecordingFs()
    with Engine.open(tmp_path / "data", options(), fs) as engine:
        put(engine, NS, list(range(1000)))
        put(engine, OTHER, list(range(300)))
        stored = engine.stats().stored_bytes
        fs.calls.clear()
        report = engine.evict(Selection(namespace_prefix=NS.root))
        names = [name for name, _ in fs.calls]
        assert names[:3] == ["commit", "rename", "fsync_dir"] and names.count("rename") == 1
        assert names.count("unlink") == 5 and report.blocks == 4  # the blobs, and what says which namespace it was
        assert engine.stats().stored_bytes == stored - report.freed_bytes
        assert [path.parent.name for path in blob_paths(tmp_path / "data")] == [OTHER.root.hex()] * 2
        require_sound(engine)
    (tmp_path / "data" / "index" / "data.mdb").unlink()
    with Engine.open(tmp_path / "data", options()) as engine:
        assert [one.info.root for one in engine.stats().namespaces] == [OTHER.root]


@pytest.mark.parametrize("at", range(4))
def test_a_namespace_whose_eviction_is_cut_short_is_whole_or_gone(tmp_path: Path, at: int) -> None:
    """As a kill at each of its steps leaves it: all of it is there, and was not acknowledged, or nothing is."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, list(range(600)))
    snapshot = tmp_path / "snapshot"
    engine = Engine.open(tmp_path / "data", options(), fs := StoppingFs(1 << 30, tmp_path / "data", snapshot))
    fs._at = len(fs.calls) + at
    with pytest.raises(Stopped):
        engine.evict(Selection(namespace_prefix=NS.root))
    with Engine.open(snapshot, options()) as engine:
        assert find(engine, NS, list(range(600))).n_tokens == (600 if at == 0 else 0)
        engine.maintain()
        require_sound(engine)


@pytest.mark.parametrize("selection", [Selection(all=True), Selection(namespace_prefix=NS.root[:4])])
def test_a_store_that_began_before_an_eviction_is_evicted_with_it(tmp_path: Path, selection: Selection) -> None:
    """Whether or not anything of the namespace is in the index yet; later stores, and those of others, are kept."""
    with Engine.open(tmp_path / "data", options()) as engine:
        began = engine.evictions

        def blocks() -> Iterator[NewBlock]:
            first, *rest = sequence(NS, list(range(600)))
            yield first
            engine.evict(selection)
            yield from rest

        receipt = engine.store(NS.to_record(), blocks())
        assert (receipt.blocks, receipt.reason) == (0, Reason.EVICTED)
        receipt = engine.store(NS.to_record(), sequence(NS, list(range(600))), since=began)
        assert (receipt.blocks, receipt.reason) == (0, Reason.EVICTED)
        assert blob_paths(tmp_path / "data") == set() and engine.stats().blobs == 0
        kept = engine.store(OTHER.to_record(), sequence(OTHER, list(range(600))), since=began)
        assert kept.reason is (Reason.EVICTED if selection.all else Reason.OK)
        assert put(engine, NS, list(range(600))).reason is Reason.OK
        require_sound(engine)


def test_evictions_of_many_namespaces_are_remembered_within_bounds() -> None:
    """What is forgotten counts for all: a store that began before it is not kept by mistake."""
    evictions = Evictions()
    for number in range(2 * MARKS_MAX):
        evictions.mark(number.to_bytes(4, "big"))
    assert evictions.number == 2 * MARKS_MAX
    assert evictions.covers(bytes(32), 0) and not evictions.covers(bytes(32), MARKS_MAX + 1)
    last = (2 * MARKS_MAX - 1).to_bytes(4, "big") + bytes(28)
    assert evictions.covers(last, 2 * MARKS_MAX - 1) and not evictions.covers(last, 2 * MARKS_MAX)
