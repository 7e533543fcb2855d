"""What was deleted stays deleted: after a kill or a power cut, with the index or without it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.core.blocks import pack_tokens
from kvstore.core.keys import Chain
from kvstore.engine import Engine, Fs, Selection, check_directory
from kvstore.errors import DirectoryError
from tests.support.engine import (
    HYBRID,
    RecordingFs,
    blob_path,
    blob_paths,
    find,
    namespace,
    options,
    put,
    put_checkpoint,
)

NS, OTHER = namespace(), namespace("other", HYBRID)
PROMPT = list(range(1000))
TOMBSTONES = "settings/tombstones"

SELECTIONS: dict[str, Callable[[Engine], Selection]] = {
    "all": lambda engine: Selection(all=True),
    "namespace": lambda engine: Selection(namespace_prefix=NS.root),
    "prefix": lambda engine: Selection(key_prefix=engine.match(Chain(NS.root, pack_tokens(PROMPT))).slices[0].row.key),
    "idle": lambda engine: Selection(namespace_prefix=NS.root, idle_s=1e-6),
    "bytes": lambda engine: Selection(namespace_prefix=NS.root, bytes=1 << 40),
}


def killed(data_dir: Path, *, lose_index: bool = False) -> Path:
    """The directory as SIGKILL leaves it at this moment, perhaps without its index."""
    copy = data_dir.with_name("killed")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(data_dir, copy)
    if lose_index:
        (copy / "index" / "data.mdb").unlink()
    return copy


@pytest.mark.parametrize("lose_index", [False, True], ids=["index kept", "index lost"])
@pytest.mark.parametrize("what", SELECTIONS)
def test_what_was_evicted_under_a_lease_does_not_return_after_a_kill(
    tmp_path: Path, what: str, lose_index: bool
) -> None:
    """The files were still there for a reader, and the index may be empty or gone: neither brings them back."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, PROMPT)
        rows = [part.row for part in engine.match(Chain(NS.root, pack_tokens(PROMPT))).slices]
        with engine.lease(rows):
            engine.evict(SELECTIONS[what](engine))
            copy = killed(tmp_path / "data", lose_index=lose_index)
    assert len(blob_paths(copy)) == len(rows)
    with Engine.open(copy, options()) as engine:
        assert find(engine, NS, PROMPT).n_tokens == 0
        assert not blob_paths(copy)
        assert not (copy / TOMBSTONES).exists()
        assert put(engine, NS, PROMPT).blocks == len(rows)
        assert find(engine, NS, PROMPT).n_tokens == len(PROMPT)


def test_an_offline_repair_obeys_tombstones_without_an_index(tmp_path: Path) -> None:
    """The repair adopts sound files that no row names, but none that was deleted."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, PROMPT)
        put(engine, OTHER, PROMPT[:300])
        with engine.lease([part.row for part in engine.match(Chain(NS.root, pack_tokens(PROMPT))).slices]):
            engine.evict(Selection(namespace_prefix=NS.root))
            copy = killed(tmp_path / "data", lose_index=True)
    check_directory(copy, repair=True)
    with Engine.open(copy, options()) as engine:
        assert find(engine, NS, PROMPT).n_tokens == 0
        assert find(engine, OTHER, PROMPT[:300]).n_tokens == 300


def test_an_offline_check_does_not_report_what_was_deleted(tmp_path: Path) -> None:
    """Files with a tombstone are known; the check changes nothing."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, PROMPT)
        with engine.lease([part.row for part in engine.match(Chain(NS.root, pack_tokens(PROMPT))).slices]):
            engine.evict(Selection(all=True))
            copy = killed(tmp_path / "data")
    before = blob_paths(copy)
    assert check_directory(copy).findings == []
    assert blob_paths(copy) == before


@pytest.mark.parametrize("lose_index", [False, True], ids=["index kept", "index lost"])
def test_durability_none_obeys_deletions_after_a_kill(tmp_path: Path, lose_index: bool) -> None:
    """There every unclean stop rebuilds the index from the files."""
    with Engine.open(tmp_path / "data", options(durability="none")) as engine:
        put(engine, NS, PROMPT)
        put(engine, OTHER, PROMPT[:300])
        with engine.lease([part.row for part in engine.match(Chain(NS.root, pack_tokens(PROMPT))).slices]):
            engine.evict(Selection(namespace_prefix=NS.root))
            copy = killed(tmp_path / "data", lose_index=lose_index)
    with Engine.open(copy, options(durability="none")) as engine:
        assert find(engine, NS, PROMPT).n_tokens == 0
        assert find(engine, OTHER, PROMPT[:300]).n_tokens == 300


def test_an_emptied_index_is_not_taken_for_a_lost_one(tmp_path: Path) -> None:
    """Files that outlived an eviction of everything (a power cut may bring them back) are strays, not blocks."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, PROMPT)
        kept = shutil.copytree(tmp_path / "data" / "blobs.noindex", tmp_path / "blobs")
        engine.evict(Selection(all=True))
        copy = killed(tmp_path / "data")
    shutil.copytree(kept, copy / "blobs.noindex", dirs_exist_ok=True)
    with Engine.open(copy, options()) as engine:
        assert find(engine, NS, PROMPT).n_tokens == 0
        assert not blob_paths(copy)


def test_an_eviction_is_acknowledged_after_its_unlinks_are_synced(tmp_path: Path) -> None:
    """Every folder from which a file went is synced before `evict` returns, what a store replaced before included."""
    fs = RecordingFs()
    with Engine.open(tmp_path / "data", options(), fs) as engine:
        put(engine, NS, PROMPT[:300])
        put(engine, NS, PROMPT)
        put(engine, OTHER, PROMPT[:300])
        folders = {NS.root.hex(), OTHER.root.hex()}
        at = len(fs.calls)
        engine.evict(Selection(bytes=1 << 40))
        calls = fs.calls[at:]
    synced = {what for call, what in calls if call == "fsync_dir"}
    last_unlink = max(number for number, (call, _) in enumerate(calls) if call == "unlink")
    assert folders <= synced
    assert all(number > last_unlink for number, (call, _) in enumerate(calls) if call == "fsync_dir")


def test_an_eviction_of_namespaces_is_acknowledged_after_their_renames_are_synced(tmp_path: Path) -> None:
    """The folder of namespaces is synced after each name went from it."""
    fs = RecordingFs()
    with Engine.open(tmp_path / "data", options(), fs) as engine:
        put(engine, NS, PROMPT)
        put(engine, OTHER, PROMPT[:300])
        at = len(fs.calls)
        engine.evict(Selection(all=True))
        calls = fs.calls[at:]
    dropped = [number for number, (call, what) in enumerate(calls) if call == "rename" and what.endswith(".dropped")]
    assert len(dropped) == 2 and all(calls[number + 1] == ("fsync_dir", "blobs.noindex") for number in dropped)


def test_an_eviction_whose_unlinks_cannot_be_synced_is_not_acknowledged(tmp_path: Path) -> None:
    """It raises; the next one, which finds nothing to remove, syncs them first."""

    class NoDirectorySync(Fs):
        broken = False

        def fsync_dir(self, path: str) -> None:
            if self.broken:
                raise OSError(errno.EIO, "the drive does not answer")
            super().fsync_dir(path)

    fs = NoDirectorySync()
    with Engine.open(tmp_path / "data", options(), fs) as engine:
        put(engine, NS, PROMPT)
        fs.broken = True
        with pytest.raises(DirectoryError, match="not known to be durable"):
            engine.evict(Selection(all=True))
        with pytest.raises(DirectoryError, match="not known to be durable"):
            engine.evict(Selection(all=True))
        fs.broken = False
        assert engine.evict(Selection(all=True)).blocks == 0


def test_freed_counts_only_what_left_the_disk(tmp_path: Path) -> None:
    """What a reader still needs is told apart, and counted as used until it goes."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, PROMPT)
        rows = [part.row for part in engine.match(Chain(NS.root, pack_tokens(PROMPT))).slices]
        sizes = [engine._shared.blobs.stored_bytes(row.root, row.blob_bytes) for row in rows]
        size = sizes[0]
        with engine.lease(rows[:3]):
            report = engine.evict(Selection(all=True))
            assert (report.blocks, report.freed_bytes, report.kept_bytes) == (4, sizes[3], 3 * size)
            used = engine.used_bytes
        engine.maintain()
        assert engine.used_bytes == used - 3 * size - 4096  # and the tombstones
        assert not (tmp_path / "data" / TOMBSTONES).exists()


class NoUnlink(Fs):
    """A disk that does not let blobs go."""

    broken = False

    def unlink(self, path: str) -> None:
        """EIO for blobs while broken."""
        if self.broken and path.endswith(".safetensors"):
            raise OSError(errno.EIO, "the disk does not answer")
        super().unlink(path)


def test_a_file_that_the_disk_does_not_let_go_gets_a_tombstone(tmp_path: Path) -> None:
    """It is not freed, no repair adopts it, its name is not used again, and it goes when the disk lets it."""
    fs = NoUnlink()
    with Engine.open(tmp_path / "data", options(), fs) as engine:
        put(engine, NS, PROMPT)
        fs.broken = True
        report = engine.evict(Selection(all=True))
        assert (report.blocks, report.freed_bytes) == (4, 0)
        assert engine.check(repair=True).findings == []
        copy = killed(tmp_path / "data", lose_index=True)
        stuck = blob_paths(copy)
        with Engine.open(copy, options(), fs) as other:
            assert find(other, NS, PROMPT).n_tokens == 0
            put(other, NS, PROMPT)
            assert stuck < blob_paths(copy) and len(blob_paths(copy)) == 2 * len(stuck)
            fs.broken = False
            other.maintain()
            assert not stuck & blob_paths(copy)
            assert find(other, NS, PROMPT).n_tokens == len(PROMPT)
        assert find(engine, NS, PROMPT).n_tokens == 0
        engine.maintain()
        assert not blob_paths(tmp_path / "data")
        assert engine.evict(Selection(all=True)).blocks == 0


def test_what_a_repair_deletes_is_kept_for_its_readers_and_does_not_return(tmp_path: Path) -> None:
    """What lost its parent waits for a lease; what the disk does not let go has a tombstone as after an eviction."""
    fs = NoUnlink()
    with Engine.open(tmp_path / "data", options(), fs) as engine:
        put(engine, NS, PROMPT)
        _, second, third, fourth = (part.row for part in engine.match(Chain(NS.root, pack_tokens(PROMPT))).slices)
        blob_path(engine, second).unlink()
        with engine.lease([third]):
            fs.broken = True
            assert engine.check(repair=True).repaired == 1
            fs.broken = False
            buried = (tmp_path / "data" / TOMBSTONES).read_text().split()
            assert set(buried) == {f"{NS.root.hex()}/{row.blob.name}" for row in (second, third, fourth)}
            engine.maintain()
            assert blob_path(engine, third).exists() and not blob_path(engine, fourth).exists()
        engine.maintain()
        assert not blob_path(engine, third).exists() and not (tmp_path / "data" / TOMBSTONES).exists()
        assert engine.stats().evictions["repair"][0] == 3


def test_a_disk_that_keeps_files_does_not_make_the_budget_empty_the_store(tmp_path: Path) -> None:
    """Evicting frees nothing there, so it stops instead of going on to the last block."""
    fs = NoUnlink()
    with Engine.open(tmp_path / "data", options(), fs) as engine:
        for number in range(20):
            put(engine, NS, [number * 1000, *range(255)])
        fs.broken = True
        engine.limit(engine.used_bytes - 4096, 0)
        assert engine.stats().blobs >= 10
        fs.broken = False


def test_without_room_for_a_tombstone_the_reader_loses_its_file(tmp_path: Path) -> None:
    """A deletion that is acknowledged outranks a lease: a reader makes a miss of a file that is gone."""

    class NoTombstones(Fs):
        def open(self, path: str, flags: int, mode: int) -> int:
            if "tombstones" in path:
                raise OSError(errno.ENOSPC, "full")
            return super().open(path, flags, mode)

    with Engine.open(tmp_path / "data", options(), NoTombstones()) as engine:
        put(engine, NS, PROMPT)
        with engine.lease([part.row for part in engine.match(Chain(NS.root, pack_tokens(PROMPT))).slices]):
            report = engine.evict(Selection(all=True))
            assert (report.blocks, report.kept_bytes) == (4, 0)
            assert not blob_paths(tmp_path / "data")


@pytest.mark.parametrize("how", ["replaced", "thinned"])
def test_what_the_engine_deletes_by_itself_under_a_lease_does_not_return(tmp_path: Path, how: str) -> None:
    """Replaced by a longer block, thinned out of its chain: after a kill without an index it stays gone."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, OTHER, PROMPT[:600])
        for length in (500, 520, 540):
            put_checkpoint(engine, OTHER, PROMPT[:length])
        match = engine.match(Chain(OTHER.root, pack_tokens(PROMPT[:520])), exact=True)
        tail = engine.match(Chain(OTHER.root, pack_tokens(PROMPT[:600]))).slices[-1].row
        assert match.checkpoint is not None
        row = tail if how == "replaced" else match.checkpoint
        path = blob_path(engine, row)
        with engine.lease([row]):
            if how == "replaced":
                put(engine, OTHER, PROMPT[:700])
            else:
                put_checkpoint(engine, OTHER, PROMPT[:560])
            assert path.exists()
            copy = killed(tmp_path / "data", lose_index=True)
    with Engine.open(copy, options()):
        assert not (copy / path.relative_to(tmp_path / "data")).exists()
