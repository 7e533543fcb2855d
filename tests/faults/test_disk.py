"""Failing disks: full, out of inodes, errors at any call, read-only, no descriptors, gone; and clocks that jump."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore.blobs.protocol import Room
from kvstore.core.blocks import Reason
from kvstore.core.keys import Chain
from kvstore.engine import Engine, Fs, Selection
from kvstore.errors import DirectoryError, KVStoreError
from tests.faults import cuts, disk, kills
from tests.faults.table import spread
from tests.faults.workload import GROWN, KEPT, NS
from tests.support.engine import find, namespace, options, put, require_sound, sequence
from tests.support.files import contents_below

DAY_S = 86_400.0
SECRET = namespace("secret")
needs_mounts = pytest.mark.skipif(bool(cuts.missing()), reason=f"NOT RUN: {cuts.missing()}")
needs_strace = pytest.mark.skipif(bool(kills.missing()), reason=f"NOT RUN: {kills.missing()}")


@needs_mounts
@pytest.mark.parametrize("inodes", [False, True])
def test_a_full_disk_costs_the_store_and_nothing_else(tmp_path: Path, inodes: bool) -> None:
    """From no room at all to room for all of it; then room again, and it goes on by itself."""
    frees = range(8) if inodes else range(0, 24, 3)
    assert [wrong for free in frees for wrong in disk.full_disk(tmp_path / str(free), free, inodes)] == []


@needs_strace
@pytest.mark.parametrize(
    ("error", "script"), [(error, script) for error in disk.ERRORS for script in disk.ERRORS[error]]
)
def test_an_error_at_any_call_breaks_no_promise(tmp_path: Path, error: str, script: str) -> None:
    """At calls that write and at calls that read."""
    harness = disk.Errors(tmp_path / "errors")
    points = [*spread(harness.points(script), 4), *spread(harness.points(script, calls=disk.READS), 3)]
    assert [wrong for point in points for wrong in harness.strike_error(point, error)] == []


@needs_mounts
def test_a_file_system_that_turns_read_only_is_read_on(tmp_path: Path) -> None:
    """As ext4 does after an error of its own: hits stay hits, stores are refused, `degraded` says why."""
    with read_only_later(tmp_path) as (data_dir, turn):
        engine = Engine.open(data_dir, options())
        put(engine, NS, KEPT)
        turn()
        assert put(engine, NS, GROWN).reason is Reason.STORE_FULL
        engine.maintain()
        assert "ead-only" in engine.stats().degraded
        assert find(engine, NS, KEPT).n_tokens == len(KEPT)
        engine.touch(find(engine, NS, KEPT).slices)
        with pytest.raises((KVStoreError, OSError)):
            engine.evict(Selection(all=True))
        with pytest.raises((KVStoreError, OSError)):
            engine.close()


@contextmanager
def read_only_later(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """(a data directory on an ext4, how to make it find an error)."""
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop,errors=remount-ro", str(image), str(mount)], check=True)
    loop = subprocess.run(["losetup", "-j", str(image)], capture_output=True, text=True, check=True).stdout
    trigger = Path("/sys/fs/ext4", loop.split(":")[0].removeprefix("/dev/"), "trigger_fs_error")
    try:
        yield mount / "data", lambda: [trigger.write_text("1"), None][1]
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_without_descriptors_stores_wait_and_nothing_is_condemned(tmp_path: Path) -> None:
    """A blob that cannot be opened for want of a descriptor is not damaged; later all is as before."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, KEPT)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(opened), hard))
        try:
            reason = put(engine, NS, GROWN).reason
            engine.maintain()
            degraded = engine.stats().degraded
            row = engine.match(Chain(NS.root, b"".join(token.to_bytes(8, "little") for token in KEPT))).slices[0].row
            with pytest.raises(KVStoreError):
                engine.recheck(row.key)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in opened:
                os.close(fd)
        assert (reason, bool(degraded)) == (Reason.STORE_FULL, True)
        engine.maintain()
        assert engine.stats().degraded == "" and engine.stats().quarantined == 0
        assert put(engine, NS, GROWN).reason is Reason.OK
        require_sound(engine)


def test_a_directory_that_is_deleted_underneath_is_survived_and_said(tmp_path: Path) -> None:
    """Nothing crashes; a new start has an empty directory."""
    engine = Engine.open(tmp_path / "data", options(free_floor_bytes=1))
    put(engine, NS, KEPT)
    match = find(engine, NS, KEPT)
    shutil.rmtree(tmp_path / "data")
    assert engine.first_unusable(match.slices) == 0
    assert put(engine, NS, GROWN).reason is Reason.STORE_FULL
    engine.maintain()
    assert engine.is_displaced() and "deleted" in engine.stats().degraded
    assert engine.match(Chain(NS.root, b"")).n_tokens == 0
    engine.close()
    with Engine.open(tmp_path / "data", options()) as again:
        assert not again.is_displaced()
        assert put(again, NS, GROWN).reason is Reason.OK
        require_sound(again)


class Volume(Fs):
    """One with so many bytes left."""

    free = 1 << 40

    def room(self, path: str) -> Room:
        return Room(self.free, 1 << 32)


@pytest.mark.parametrize("durability", ["commit", "none"])
def test_a_directory_that_was_away_for_a_while_has_lost_nothing(tmp_path: Path, durability: str) -> None:
    """Nothing is condemned for being out of reach, or evicted for the sake of what stands there meanwhile."""
    volume = Volume()
    limits = options(durability=durability, free_floor_bytes=1 << 20, scrub_bytes_per_s=1 << 30)
    engine = Engine.open(tmp_path / "data", limits, fs=volume)
    put(engine, NS, KEPT)
    match = find(engine, NS, KEPT)
    (tmp_path / "data").rename(tmp_path / "away")
    with Engine.open(tmp_path / "data", options()) as other:
        put(other, NS, GROWN)
        volume.free = 0
        for turn in range(2):
            engine.maintain()
            assert engine.stats().degraded and not engine.recheck(match.slices[turn].row.key)
        require_sound(other)
    (tmp_path / "data").rename(tmp_path / "other")
    (tmp_path / "away").rename(tmp_path / "data")
    volume.free = 1 << 40
    engine.maintain()
    assert engine.stats().degraded == "" and find(engine, NS, KEPT).n_tokens == len(KEPT)
    (tmp_path / "data").rename(tmp_path / "away")
    engine.close()
    with Engine.open(tmp_path / "away", options()) as again:
        assert find(again, NS, KEPT).n_tokens == len(KEPT)
        require_sound(again)


def test_nothing_is_changed_in_a_directory_that_took_the_place_of_another(tmp_path: Path) -> None:
    """Names are of keys and small numbers, so those of a copy, or of what stands behind another link, are the same."""
    limits = options(master_key=bytes(range(32)))
    with Engine.open(tmp_path / "first", limits) as first:
        put(first, NS, KEPT)
        key = first.encrypt(SECRET.root)
        first.store(SECRET.to_record(), sequence(SECRET, KEPT), encryption=key)
    del key
    for copy in ("second", "reference"):
        shutil.copytree(tmp_path / "first", tmp_path / copy)
    shutil.copytree(tmp_path / "first.keys", tmp_path / "second.keys")
    (tmp_path / "data").symlink_to(tmp_path / "first")
    engine = Engine.open(tmp_path / "data", limits)
    match = find(engine, NS, KEPT)
    lease = engine.lease([part.row for part in match.slices])
    engine.evict(Selection(namespace_prefix=NS.root, bytes=1))
    (tmp_path / "data").unlink()
    (tmp_path / "data").symlink_to(tmp_path / "second")
    lease.release()
    assert put(engine, NS, GROWN).reason is Reason.STORE_FULL and engine.stats().degraded
    assert not engine.make_room(1)
    for change in (
        lambda: engine.evict(Selection(all=True)),
        lambda: engine.shred(SECRET.root),
        lambda: engine.check(repair=True),
    ):
        with pytest.raises(DirectoryError, match="replaced"):
            change()
    engine.limit(1 << 16, 0)
    engine.close()
    for path, data in contents_below(tmp_path / "reference").items():
        assert (tmp_path / "second" / path.relative_to(tmp_path / "reference")).read_bytes() == data
    with Engine.open(tmp_path / "second", limits) as engine:
        require_sound(engine)
        assert find(engine, SECRET, KEPT).n_tokens == len(KEPT)
    with Engine.open(tmp_path / "first", limits) as engine:
        require_sound(engine)


@pytest.mark.parametrize("jump", [-3 * DAY_S, 3 * DAY_S])
def test_a_clock_that_jumps_days_changes_no_answer_and_no_order(tmp_path: Path, jump: float) -> None:
    """Use after the jump is later than use before it, whatever the clock says, also over a restart."""
    now = [1_800_000_000.0]
    sequences = [[number, *range(40)] for number in range(6)]
    with Engine.open(tmp_path / "data", options(), clock=lambda: now[0]) as engine:
        for tokens in sequences[:3]:
            put(engine, NS, tokens)
        now[0] += jump
        for tokens in sequences[3:]:
            put(engine, NS, tokens)
        engine.touch(find(engine, NS, sequences[0]).slices)
    with Engine.open(tmp_path / "data", options(), clock=lambda: now[0]) as engine:
        engine.evict(Selection(bytes=1))
        assert [find(engine, NS, tokens).n_tokens for tokens in sequences[:2]] == [41, 0]
        assert engine.evict(Selection(idle_s=4 * DAY_S), dry_run=True).blocks == 0
        require_sound(engine)
