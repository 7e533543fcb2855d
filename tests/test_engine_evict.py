"""Budget, floor, eviction and leases: what goes, in which order, and that the disk agrees."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.blobs.protocol import Room
from kvstore.core.blocks import Reason
from kvstore.core.histogram import Distribution
from kvstore.core.keys import Namespace
from kvstore.engine import Engine, Fs, NewBlock, Selection
from kvstore.errors import InvalidRequestError, StoreFullError
from tests.support.engine import (
    RecordingFs,
    blob_path,
    blob_paths,
    disk_usage,
    find,
    namespace,
    options,
    put,
    require_sound,
    sequence,
)

NS = namespace()
# One full block of the test layout costs this much on disk, header included.
BLOCK_BYTES = 12_288


class Clock:
    """A wall clock to be set."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        self.now_s += 1
        return self.now_s


class SmallVolume(Fs):
    """A volume whose free space is what it was told, less what blobs take; `pinned`: unlinking frees nothing."""

    def __init__(self, data_dir: Path, total_bytes: int, pinned: bool = False) -> None:
        self.data_dir = data_dir
        self.total_bytes = total_bytes
        self.pinned = pinned
        self.most = 0

    def room(self, path: str) -> Room:
        used = sum(-(-blob.stat().st_size // 4096) * 4096 for blob in blob_paths(self.data_dir))
        self.most = max(self.most, used)
        return Room(self.total_bytes - (self.most if self.pinned else used), 1 << 32)


def first_tokens(engine: Engine) -> set[int]:
    """Which sequences, told by their first token, still have their first block."""
    rows = [info.row for info in engine.list_blocks() if info.row.start == 0]
    return {int.from_bytes(row.tokens[:8], "little") for row in rows}


def fill(engine: Engine, names: range, ns: Namespace = NS) -> None:
    """One full block each."""
    for name in names:
        assert put(engine, ns, [name] * 256).reason is Reason.OK


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    """Use, not age, decides; matching alone is not use."""
    with Engine.open(tmp_path / "data", options(), clock=Clock()) as engine:
        fill(engine, range(5))
        engine.touch(find(engine, NS, [0] * 256).slices)
        find(engine, NS, [1] * 256)
        engine.evict(Selection(bytes=2 * BLOCK_BYTES))
        assert first_tokens(engine) == {0, 3, 4}
        engine.evict(Selection(bytes=1))
        assert first_tokens(engine) == {0, 4}
        require_sound(engine)


def test_the_order_of_use_survives_a_restart(tmp_path: Path) -> None:
    """Noted in memory, written when the engine closes."""
    clock = Clock()
    with Engine.open(tmp_path / "data", options(), clock=clock) as engine:
        fill(engine, range(4))
        engine.touch(find(engine, NS, [0] * 256).slices)
    with Engine.open(tmp_path / "data", options(), clock=clock) as engine:
        engine.evict(Selection(bytes=1))
        assert first_tokens(engine) == {0, 2, 3}


def test_use_is_written_in_batches(tmp_path: Path) -> None:
    """No commit on the thread of a fetch; upkeep writes notes when there are many, or when they are old."""
    fs, clock = RecordingFs(), Clock()
    with Engine.open(tmp_path / "data", options(touches_max=3), fs, clock) as engine:
        fill(engine, range(3))
        slices = [find(engine, NS, [name] * 256).slices for name in range(3)]
        fs.calls.clear()
        engine.touch(slices[0])
        engine.touch(slices[1])
        engine.maintain()
        assert fs.calls == []
        engine.touch(slices[2])
        assert fs.calls == []
        engine.maintain()
        assert [name for name, _ in fs.calls] == ["commit"]
        engine.touch(slices[0])
        clock.now_s += 60
        engine.maintain()
        assert [name for name, _ in fs.calls] == ["commit", "commit"]


def test_children_go_before_their_parents(tmp_path: Path) -> None:
    """Whatever was used last: at every step every block can be reached from its root."""
    with Engine.open(tmp_path / "data", options(), clock=Clock()) as engine:
        put(engine, NS, list(range(800)))
        put(engine, NS, [*range(300), *range(500)])
        engine.touch(find(engine, NS, [*range(300), *range(100)]).slices[1:])
        left = len(engine.list_blocks())
        while left:
            assert engine.evict(Selection(bytes=1)).blocks == 1
            rows = {info.row.key: info.row for info in engine.list_blocks()}
            assert all(row.parent in rows or row.parent == NS.root for row in rows.values())
            left -= 1
            assert len(rows) == left
        require_sound(engine)


def test_a_parent_is_as_recent_as_its_child(tmp_path: Path) -> None:
    """An old beginning with a new end outlives what lies between in age."""
    with Engine.open(tmp_path / "data", options(), clock=Clock()) as engine:
        put(engine, NS, [1] * 256)
        fill(engine, range(2, 5))
        engine.store(NS.to_record(), sequence(NS, [1] * 300, start=256))
        engine.evict(Selection(bytes=2 * BLOCK_BYTES))
        assert first_tokens(engine) == {1, 4}
        assert find(engine, NS, [1] * 300).n_tokens == 300


def test_the_budget_is_kept_and_is_what_the_disk_says(tmp_path: Path) -> None:
    """Blobs, index and quarantine together never pass it, and newer sequences push out older ones."""
    budget = 400_000
    with Engine.open(tmp_path / "data", options(budget_bytes=budget), clock=Clock()) as engine:
        for name in range(60):
            assert put(engine, NS, [name] * 300).reason is Reason.OK
            assert engine.used_bytes == disk_usage(tmp_path / "data") <= budget
        assert 59 in first_tokens(engine) and 0 not in first_tokens(engine)
        assert find(engine, NS, [0] * 300).reason is Reason.EVICTED
        require_sound(engine)


def test_a_smaller_budget_holds_from_the_start(tmp_path: Path) -> None:
    """Opening evicts down to it."""
    with Engine.open(tmp_path / "data", options()) as engine:
        fill(engine, range(40))
        rest_bytes = engine.used_bytes - engine.stats().stored_bytes
    budget = rest_bytes + 20 * BLOCK_BYTES
    with Engine.open(tmp_path / "data", options(budget_bytes=budget)) as engine:
        assert engine.used_bytes <= budget
        assert 10 <= engine.stats().blobs <= 20
        require_sound(engine)


def test_a_store_that_does_not_fit_keeps_what_fits(tmp_path: Path) -> None:
    """Its own blocks are not evicted for its next ones; the receipt counts those that are in."""
    with Engine.open(tmp_path / "data", options(budget_bytes=400_000)) as engine:
        fill(engine, range(3))
        receipt = put(engine, NS, list(range(50 * 256)))
        assert receipt.reason is Reason.STORE_FULL and 3 < receipt.blocks < 20
        assert find(engine, NS, list(range(50 * 256))).n_tokens == receipt.blocks * 256
        assert put(engine, NS, list(range(5))).reason is Reason.OK
        assert engine.stats().degraded == ""
        require_sound(engine)


def test_what_can_never_fit_does_not_empty_the_store(tmp_path: Path) -> None:
    """Larger than the budget: refused, and everything stays."""
    with Engine.open(tmp_path / "data", options(budget_bytes=300_000)) as engine:
        fill(engine, range(3))
        assert not engine.make_room(300_000) and not engine.could_make_room(300_000)
        assert first_tokens(engine) == {0, 1, 2}
        assert engine.make_room(5_000)


def test_no_budget_at_all_stores_nothing(tmp_path: Path) -> None:
    """And says so."""
    with Engine.open(tmp_path / "data", options(budget_bytes=0)) as engine:
        receipt = put(engine, NS, list(range(300)))
        assert (receipt.blocks, receipt.reason) == (0, Reason.STORE_FULL)
        assert engine.stats().degraded
        require_sound(engine)


def test_the_chain_that_is_being_extended_is_not_evicted_for_it(tmp_path: Path) -> None:
    """The oldest of all, but the parent of what is being written; and whatever the caller protects."""
    with Engine.open(tmp_path / "data", options(budget_bytes=450_000), clock=Clock()) as engine:
        put(engine, NS, [1] * 256)
        put(engine, NS, [2] * 256)
        protected = find(engine, NS, [2] * 256).slices[0].row.key
        fill(engine, range(3, 9))
        blocks = sequence(NS, [1] * 256 + list(range(256 * 40)), start=256)
        receipt = engine.store(NS.to_record(), blocks, protect=[protected])
        assert receipt.reason is Reason.STORE_FULL and receipt.blocks
        # Of the others, what is too little for one more block may stay.
        assert {1, 2} <= first_tokens(engine) <= {1, 2, 8}
        require_sound(engine)


def test_leased_blocks_go_last_and_then_they_go(tmp_path: Path) -> None:
    """A lease protects while there is anything else; the budget wins."""
    with Engine.open(tmp_path / "data", options(), clock=Clock()) as engine:
        fill(engine, range(4))
        first = find(engine, NS, [0] * 256).slices[0].row
        lease = engine.lease([first])
        options_before = engine._shared.options
        object.__setattr__(options_before, "budget_bytes", engine.used_bytes - 1)
        engine.maintain()
        assert first_tokens(engine) == {0, 2, 3}
        object.__setattr__(options_before, "budget_bytes", engine.used_bytes - engine.stats().stored_bytes)
        engine.maintain()
        assert first_tokens(engine) == set() and not blob_path(engine, first).exists()
        lease.release()
        require_sound(engine)


def test_the_file_of_a_replaced_row_stays_while_it_is_leased(tmp_path: Path) -> None:
    """Somebody was told its path a moment ago; it counts until it goes."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, list(range(50)))
        row = find(engine, NS, list(range(50))).slices[0].row
        with engine.lease([row]), engine.lease([row]):
            put(engine, NS, list(range(60)))
            assert blob_path(engine, row).exists()
            assert engine.used_bytes == disk_usage(tmp_path / "data")
            assert engine.check(repair=True).findings == []
        assert not blob_path(engine, row).exists()
        require_sound(engine)


def test_under_the_free_floor_the_deficit_is_evicted_and_no_more(tmp_path: Path) -> None:
    """Others filled the volume: so much goes, then storing goes on."""
    data_dir = tmp_path / "data"
    volume = SmallVolume(data_dir, 20 * BLOCK_BYTES)
    with Engine.open(data_dir, options(free_floor_bytes=5 * BLOCK_BYTES), volume, Clock()) as engine:
        fill(engine, range(10))
        volume.total_bytes -= 8 * BLOCK_BYTES
        engine.maintain()
        assert first_tokens(engine) == set(range(3, 10))
        assert put(engine, NS, [77] * 256).reason is Reason.OK
        assert volume.room("").free_bytes >= 5 * BLOCK_BYTES
        assert engine.stats().degraded == ""
        require_sound(engine)


@pytest.mark.parametrize(("less", "left"), [(8 * BLOCK_BYTES, 5), (5 * BLOCK_BYTES, 8), (4 * BLOCK_BYTES, 9)])
def test_a_volume_that_stays_full_does_not_drain_the_store(tmp_path: Path, less: int, left: int) -> None:
    """A snapshot keeps the space: the deficit is evicted once, then writing stops, says so, and comes back."""
    data_dir = tmp_path / "data"
    volume = SmallVolume(data_dir, 20 * BLOCK_BYTES, pinned=True)
    with Engine.open(data_dir, options(free_floor_bytes=5 * BLOCK_BYTES), volume, Clock()) as engine:
        fill(engine, range(10))
        volume.total_bytes -= less
        for _ in range(5):
            engine.maintain()
            assert put(engine, NS, [77] * 256).reason is Reason.STORE_FULL
            assert "floor" in engine.stats().degraded
        assert first_tokens(engine) == set(range(10 - left, 10))
        volume.pinned = False
        assert put(engine, NS, [77] * 256).reason is Reason.OK
        assert engine.stats().degraded == ""
        require_sound(engine)


def test_an_eviction_that_cannot_reach_its_goal_is_not_begun(tmp_path: Path) -> None:
    """Neither for a budget below what the index takes nor for a floor that all blobs together would not free."""
    data_dir = tmp_path / "data"
    volume = SmallVolume(data_dir, 20 * BLOCK_BYTES)
    with Engine.open(data_dir, options(), volume, Clock()) as engine:
        fill(engine, range(5))
        index_bytes = engine.stats().index_bytes
        engine.limit(budget_bytes=index_bytes, free_floor_bytes=0)
        engine.maintain()
        assert len(first_tokens(engine)) == 5 and "budget" in engine.stats().degraded
        engine.limit(budget_bytes=1 << 30, free_floor_bytes=21 * BLOCK_BYTES)
        engine.maintain()
        assert len(first_tokens(engine)) == 5 and "floor" in engine.stats().degraded
        engine.limit(budget_bytes=1 << 30, free_floor_bytes=18 * BLOCK_BYTES)
        engine.maintain()
        assert first_tokens(engine) == {3, 4} and engine.stats().degraded == ""
        require_sound(engine)


def populate(engine: Engine, clock: Clock) -> tuple[Namespace, bytes]:
    """Two namespaces, an old and a new sequence each; returns the second, and the key of a middle block."""
    other = namespace("other")
    for ns in (NS, other):
        put(engine, ns, list(range(700)))
    clock.now_s += 10_000
    for ns in (NS, other):
        put(engine, ns, [-1, *range(300)])
    return other, find(engine, NS, list(range(700))).slices[1].row.key


@pytest.mark.parametrize("what", ["namespace", "key", "idle", "bytes", "all", "idle in namespace"])
def test_every_selection_frees_what_it_reports(tmp_path: Path, what: str) -> None:
    """A dry run reports the same and changes nothing; then the disk agrees to the byte."""
    clock = Clock()
    with Engine.open(tmp_path / "data", options(), clock=clock) as engine:
        other, key = populate(engine, clock)
        selection, blocks = {
            "namespace": (Selection(namespace_prefix=other.root[:5]), 5),
            "key": (Selection(key_prefix=key[:8]), 2),
            "idle": (Selection(idle_s=5_000), 6),
            "bytes": (Selection(bytes=BLOCK_BYTES + 1), 2),
            "all": (Selection(all=True), 10),
            "idle in namespace": (Selection(namespace_prefix=NS.root, idle_s=5_000), 3),
        }[what]
        files = blob_paths(tmp_path / "data")
        planned = engine.evict(selection, dry_run=True)
        assert blob_paths(tmp_path / "data") == files and len(engine.list_blocks()) == 10
        before = sum(path.stat().st_blocks * 512 for path in files)
        report = engine.evict(selection)
        assert report == planned and report.blocks == blocks
        left = sum(path.stat().st_blocks * 512 for path in blob_paths(tmp_path / "data"))
        assert before - left == report.freed_bytes
        require_sound(engine)
        assert engine.evict(Selection(namespace_prefix=b"\1" * 32)).blocks == 0


def test_an_eviction_by_a_key_that_is_not_clear_is_refused(tmp_path: Path) -> None:
    """Leading bytes that several keys have remove nothing; with one more byte it is the one block."""
    with Engine.open(tmp_path / "data", options()) as engine:
        by_byte: dict[bytes, list[bytes]] = {}
        for n in range(40):
            put(engine, NS, [n, *range(10)])
        for info in engine.list_blocks():
            by_byte.setdefault(info.row.key[:1], []).append(info.row.key)
        first, keys = next((first, keys) for first, keys in by_byte.items() if len(keys) > 1)
        for dry_run in (True, False):
            with pytest.raises(InvalidRequestError, match=f"{len(keys)} blocks have a key that starts so"):
                engine.evict(Selection(key_prefix=first), dry_run)
        assert len(engine.list_blocks()) == 40
        assert engine.evict(Selection(key_prefix=keys[0][:4])).blocks == 1


def test_an_eviction_that_selects_nothing_in_particular_is_refused(tmp_path: Path) -> None:
    """`all` must be said."""
    with Engine.open(tmp_path / "data", options()) as engine, pytest.raises(InvalidRequestError):
        engine.evict(Selection())


def test_large_evictions_take_several_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded transactions, the same result."""
    monkeypatch.setattr("kvstore.engine.evict.VICTIMS_MAX", 4)
    fs = RecordingFs()
    with Engine.open(tmp_path / "data", options(), fs) as engine:
        put(engine, NS, list(range(256 * 10)))
        planned = engine.evict(Selection(all=True), dry_run=True)
        fs.calls.clear()
        assert engine.evict(Selection(all=True)) == planned
        assert planned.blocks == 10
        assert [name for name, _ in fs.calls].count("commit") == 3
        require_sound(engine)


def test_what_was_evicted_is_remembered_within_bounds(tmp_path: Path) -> None:
    """The reason is given for a block, a cut of it, and a continuation; long ago is forgotten."""
    with Engine.open(tmp_path / "data", options(evicted_max=8)) as engine:
        put(engine, NS, list(range(100)))
        engine.evict(Selection(all=True))
        for asked in (100, 60, 400):
            assert find(engine, NS, list(range(asked))).reason is Reason.EVICTED
        assert find(engine, NS, [*range(5), 9]).reason is Reason.IDENTITY
        fill(engine, range(10, 20))
        engine.evict(Selection(all=True))
        assert find(engine, NS, list(range(100))).reason is Reason.IDENTITY
        assert len(engine._shared.lost._gone) <= 8
        put(engine, NS, list(range(100)))
        assert find(engine, NS, list(range(100))).reason is Reason.OK


def test_a_clock_that_goes_back_does_not_turn_the_order(tmp_path: Path) -> None:
    """Stamps never decrease, also over a restart."""
    clock = Clock()
    with Engine.open(tmp_path / "data", options(), clock=clock) as engine:
        fill(engine, range(2))
    clock.now_s -= 500_000
    with Engine.open(tmp_path / "data", options(), clock=clock) as engine:
        fill(engine, range(2, 4))
        engine.evict(Selection(bytes=1))
        assert 2 in first_tokens(engine) and 3 in first_tokens(engine)


def test_a_new_block_does_not_push_out_its_own_request(tmp_path: Path) -> None:
    """One block at a time under a budget for a few: each store is whole or says how far it came."""
    with Engine.open(tmp_path / "data", options(budget_bytes=400_000)) as engine:
        made: list[NewBlock] = sequence(NS, list(range(256 * 40)))
        for number, block in enumerate(made):
            receipt = engine.store(NS.to_record(), [block])
            if receipt.reason is not Reason.OK:
                break
            assert find(engine, NS, list(range(256 * (number + 1)))).n_tokens == 256 * (number + 1)
        assert receipt.reason is Reason.STORE_FULL and number > 2
        require_sound(engine)


class FullVolume(Fs):
    """A volume so full that the index cannot commit, until the ballast is gone."""

    def __init__(self, data_dir: Path) -> None:
        self.ballast = data_dir / "index" / "ballast"
        self.full = False

    def commit(self, commit: Callable[[], None]) -> None:
        if self.full and self.ballast.exists():
            raise StoreFullError("no space for a page")
        commit()


def test_on_a_full_volume_the_ballast_lets_an_eviction_through(tmp_path: Path) -> None:
    """It is given up for the commit that frees space, and laid again afterwards; also when starting."""
    volume = FullVolume(tmp_path / "data")
    settings = options(ballast_bytes=100_000)
    with Engine.open(tmp_path / "data", settings, volume) as engine:
        put(engine, NS, list(range(700)))
        planned = engine.evict(Selection(bytes=1), dry_run=True)
        volume.full = True
        assert put(engine, NS, [5]).reason is Reason.STORE_FULL
        assert engine.evict(Selection(bytes=1)) == planned
        assert volume.ballast.stat().st_size == 100_000
        volume.full = False
        engine.maintain()
        require_sound(engine)
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "data", copy)
    volume = FullVolume(copy)
    volume.full = True
    with Engine.open(copy, settings, volume) as engine:
        assert find(engine, NS, list(range(700))).n_tokens == 512
    volume.ballast.unlink()
    volume.ballast.mkdir()
    with pytest.raises(StoreFullError), Engine.open(copy, options(), volume) as engine:
        engine.evict(Selection(all=True))


def counted(distribution: Distribution) -> dict[float, int]:
    """How many values are in the bucket up to each bound, where there are any."""
    bounds = (*distribution.bounds, float("inf"))
    return {bound: count for bound, count in zip(bounds, distribution.counts, strict=True) if count}


def test_the_times_between_uses_and_before_an_eviction_are_counted(tmp_path: Path) -> None:
    """Also over a restart; what a user asked to evict and what a store touches tell nothing."""
    clock = Clock()
    with Engine.open(tmp_path / "data", options(), clock=clock) as engine:
        fill(engine, range(3))
    clock.now_s += 7200
    with Engine.open(tmp_path / "data", options(), clock=clock) as engine:
        slices = find(engine, NS, [0] * 256).slices
        engine.touch(slices)
        assert counted(engine.stats().reuse_s) == {}
        clock.now_s += 120
        engine.touch(slices, fetched=True)
        engine.touch(find(engine, NS, [1] * 256).slices, fetched=True)
        engine.touch((), fetched=True)
        assert counted(engine.stats().reuse_s) == {300: 1, 21600: 1}
        clock.now_s += 600
        engine.evict(Selection(bytes=1))
        assert counted(engine.stats().idle_s) == {}
        engine.limit(engine.used_bytes - 1, 1)
        engine.maintain()
        assert sum(counted(engine.stats().idle_s).values()) >= 1
        assert min(counted(engine.stats().idle_s)) == 1800
