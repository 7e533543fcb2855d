"""What every object store of the remote tier promises. A new one adds itself to MAKERS and inherits the rest."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.blobs.readers import Readers
from kvstore.config.remote_address import RemoteAddress, S3Access
from kvstore.core.breaker import Deadline
from kvstore.errors import (
    ConfigError,
    DeadlineError,
    InvalidRequestError,
    ObjectChangedError,
    RemoteError,
    RemoteFullError,
)
from kvstore.remote.folder import THREADS_MAX, FolderStore
from kvstore.remote.object_store import MARKER, PAGE_NAMES_MAX, ByteRange, Head, ObjectStore, Wanted, whole
from kvstore.remote.open_store import honours_create, open_store
from kvstore.remote.s3 import S3Store
from tests.support.memory_objects import MemoryStore
from tests.support.moto_server import KEY_ID, SECRET, new_bucket, s3_server

LONG_S = 60.0
MAKERS: dict[str, Callable[[Path, str], ObjectStore]] = {
    "memory": lambda tmp, endpoint: MemoryStore(marked=False),
    "folder": lambda tmp, endpoint: FolderStore(str(tmp / "share")),
    "s3": lambda tmp, endpoint: S3Store(*new_bucket(endpoint)),
}


def soon() -> Deadline:
    """A deadline that does not decide."""
    return Deadline(LONG_S)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Of an S3 server."""
    with s3_server() as url:
        yield url


@pytest.fixture(params=MAKERS)
def unmarked_store(request: pytest.FixtureRequest, tmp_path: Path, endpoint: str) -> ObjectStore:
    """Each of them, empty, without a marker."""
    return MAKERS[request.param](tmp_path, endpoint)


@pytest.fixture
def store(unmarked_store: ObjectStore) -> ObjectStore:
    """Each of them, empty, ready to be written to."""
    assert unmarked_store.mark(soon())
    return unmarked_store


def create(store: ObjectStore, name: str, data: bytes = b"data") -> bool:
    """Of two parts."""
    half = len(data) // 2
    return store.create(name, [memoryview(data[:half]), memoryview(data[half:])], soon())


def head(store: ObjectStore, name: str) -> Head:
    """Of an object that is there."""
    (found,) = store.head([name], soon())
    assert found is not None
    return found


def read(store: ObjectStore, name: str) -> bytes:
    """All of it."""
    found = head(store, name)
    return b"".join(store.read(name, found.etag, whole(found), soon()))


def test_what_was_created_comes_back_whole_and_in_ranges(store: ObjectStore) -> None:
    """Ranges may be empty in number, overlap, and stand in any order."""
    data = os.urandom(100_000)
    assert create(store, "ns/ab/key.exact", data)
    found = head(store, "ns/ab/key.exact")
    assert found.nbytes == len(data)
    assert read(store, "ns/ab/key.exact") == data
    ranges = [ByteRange(70_000, 30_000), ByteRange(5, 1), ByteRange(0, 80_000)]
    pieces = store.read("ns/ab/key.exact", found.etag, ranges, soon())
    assert [bytes(one) for one in pieces] == [data[at : at + n] for at, n in ranges]
    assert store.read("ns/ab/key.exact", found.etag, [], soon()) == []


def test_an_object_that_is_there_stays(store: ObjectStore) -> None:
    """A second create says so and changes nothing."""
    assert create(store, "a/b", b"first")
    before = head(store, "a/b")
    assert not create(store, "a/b", b"other")
    assert head(store, "a/b") == before
    assert read(store, "a/b") == b"first"


def test_of_sixteen_writers_of_one_name_one_object_stays_whole(store: ObjectStore) -> None:
    """Some were told that theirs was created, and the object is one of those, never a mixture."""
    bodies = [bytes([65 + one]) * 50_000 for one in range(16)]
    barrier = threading.Barrier(16)

    def write(body: bytes) -> bool:
        barrier.wait()
        return create(store, "race/one", body)

    with ThreadPoolExecutor(16) as pool:
        created = list(pool.map(write, bodies))
    assert any(created)
    assert read(store, "race/one") in [body for body, was in zip(bodies, created, strict=True) if was]
    assert [one.name for one in store.names("", "", soon())] == ["race/one"]


def test_heads_come_in_the_order_that_was_asked(store: ObjectStore) -> None:
    """None for what is not there, also below names that are objects themselves."""
    create(store, "a/1", b"x")
    create(store, "a/3", b"xyz")
    found = store.head(["a/3", "a/2", "a/1", "a/1/b", "z/z/z"], soon())
    assert [one and one.nbytes for one in found] == [3, None, 1, None, None]
    assert store.head([], soon()) == []


def test_a_read_is_of_the_object_that_was_pinned_or_an_error(store: ObjectStore) -> None:
    """Deleted and created again it is another one, even of the same size."""
    create(store, "a/1", b"first")
    pinned = head(store, "a/1")
    store.delete(["a/1"], soon())
    with pytest.raises(ObjectChangedError):
        store.read("a/1", pinned.etag, whole(pinned), soon())
    create(store, "a/1", b"other")
    with pytest.raises(ObjectChangedError):
        store.read("a/1", pinned.etag, whole(pinned), soon())
    assert read(store, "a/1") == b"other"


def test_of_many_objects_each_has_its_own_answer(store: ObjectStore) -> None:
    """One that is gone, or another by now, says nothing about the others."""
    for name in ("a/1", "a/2", "a/3"):
        create(store, name, name.encode() * 10)
    wanted = [Wanted(name, head(store, name).etag, whole(head(store, name))) for name in ("a/3", "a/2", "a/1")]
    store.delete(["a/2"], soon())
    third, second, first = store.read_all(wanted, soon())
    assert isinstance(second, ObjectChangedError)
    assert isinstance(first, list) and isinstance(third, list)
    assert (bytes(first[0]), bytes(third[0])) == (b"a/1" * 10, b"a/3" * 10)
    assert store.read_all([], soon()) == []


def test_a_range_beyond_the_end_is_an_error(store: ObjectStore) -> None:
    """Fewer bytes than were asked for are never returned."""
    create(store, "a/1", b"12345")
    with pytest.raises(RemoteError):
        store.read("a/1", head(store, "a/1").etag, [ByteRange(3, 3)], soon())


def test_names_come_in_order_and_by_page(store: ObjectStore) -> None:
    """Each page begins after the last name of the one before; the marker is none of them."""
    names = sorted(["a0/x", "a1/c/d", "a1/x", "a1/x.y", "b/1", "b/2"])
    for name in reversed(names):
        create(store, name)
    assert [one.name for one in store.names("", "", soon())] == names
    assert [one.name for one in store.names("", "a1/x", soon())] == [name for name in names if name > "a1/x"]
    assert [one.name for one in store.names("b/", "", soon())] == ["b/1", "b/2"]
    assert [one.name for one in store.names("a1/", "a1/x", soon())] == ["a1/x.y"]
    assert store.names("c/", "", soon()) == []
    (one,) = store.names("b/", "b/1", soon())
    assert one.head == head(store, "b/2")
    assert abs(one.modified_s - time.time()) < 3600


def test_what_was_deleted_is_gone(store: ObjectStore) -> None:
    """What was gone before does not matter."""
    create(store, "a/1")
    create(store, "a/2")
    store.delete(["a/1", "a/9", "x/y"], soon())
    assert [one.name for one in store.names("", "", soon())] == ["a/2"]
    store.delete(["a/2"], soon())
    store.delete([], soon())
    assert store.names("", "", soon()) == []
    assert create(store, "a/1")


def test_nothing_is_written_where_no_marker_is(unmarked_store: ObjectStore) -> None:
    """The message says how to set the place up; that is done once."""
    with pytest.raises(RemoteError, match="remote-init"):
        create(unmarked_store, "a/1")
    with pytest.raises(RemoteError, match="remote-init"):
        unmarked_store.require_mark(soon())
    assert unmarked_store.mark(soon())
    assert not unmarked_store.mark(soon())
    unmarked_store.require_mark(soon())
    assert create(unmarked_store, "a/1")


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/.b", "A", "a b", "a" * 600])
def test_names_that_lead_elsewhere_are_refused(store: ObjectStore, name: str) -> None:
    """Before the store is asked."""
    for call in (
        lambda: create(store, name),
        lambda: store.head([name], soon()),
        lambda: store.read(name, "e", [ByteRange(0, 1)], soon()),
        lambda: store.delete([name], soon()),
    ):
        with pytest.raises(InvalidRequestError):
            call()


def test_a_deadline_that_has_passed_is_held(store: ObjectStore) -> None:
    """No call is made."""
    create(store, "a/1")
    late = Deadline(0.0)
    found = head(store, "a/1")
    for call in (
        lambda: store.create("a/2", [memoryview(b"x")], late),
        lambda: store.head(["a/1"], late),
        lambda: store.read("a/1", found.etag, whole(found), late),
        lambda: store.names("", "", late),
        lambda: store.delete(["a/1"], late),
    ):
        with pytest.raises(DeadlineError):
            call()
    assert [one.name for one in store.names("", "", soon())] == ["a/1"]


def test_the_probe_finds_that_an_object_that_is_there_stays(store: ObjectStore) -> None:
    """And leaves nothing behind."""
    assert honours_create(store, soon())
    assert store.names("", "", soon()) == []


def test_the_probe_finds_that_a_second_write_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some stores ignore the condition. It is said, and that is all: what is read is verified anyway."""
    store = MemoryStore()

    def overwrite(name: str, parts: Sequence[memoryview], deadline: Deadline) -> bool:
        store.put(name, b"".join(parts))
        return True

    monkeypatch.setattr(store, "create", overwrite)
    assert not honours_create(store, soon())
    assert store.names("", "", soon()) == []


def test_no_message_of_an_s3_store_has_a_secret(endpoint: str) -> None:
    """Neither what is shown of it, nor of how it is reached, nor what it says when the store refuses."""
    address, access = new_bucket(endpoint)
    for where in (access, replace(access, endpoint="http://127.0.0.1:9")):
        store = open_store(replace(address, bucket="kv-of-nobody"), where)
        with pytest.raises(RemoteError) as caught:
            store.create("a/1", [memoryview(b"x")], soon())
        shown = "".join(traceback.format_exception(caught.value)) + repr(store) + repr(where) + str(store.place)
        assert SECRET not in shown
        assert KEY_ID not in shown


def test_s3_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder needs no extra."""
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match="remote"):
        open_store(RemoteAddress(bucket="kv-x"), S3Access("http://127.0.0.1:9"))
    assert isinstance(open_store(RemoteAddress(folder="/share"), S3Access()), FolderStore)


def folder_at(tmp_path: Path, **given: object) -> tuple[FolderStore, Path]:
    """A marked one, and where it is."""
    store = FolderStore(str(tmp_path / "share"), **given)  # type: ignore[arg-type]
    store.mark(soon())
    return store, tmp_path / "share"


def test_a_folder_that_is_unmounted_is_never_filled(tmp_path: Path) -> None:
    """An empty mount point has no marker; also one that is missing stays so."""
    store, share = folder_at(tmp_path)
    create(store, "a/1")
    share.rename(tmp_path / "away")
    with pytest.raises(RemoteError, match="not mounted"):
        create(store, "a/2")
    assert not share.exists()
    share.mkdir()
    with pytest.raises(RemoteError, match="not mounted"):
        create(store, "a/2")
    with pytest.raises(RemoteError, match="not mounted"):
        store.read("a/1", "x", [ByteRange(0, 1)], soon())
    assert list(share.iterdir()) == []
    share.rmdir()
    (tmp_path / "away").rename(share)
    assert read(store, "a/1") == b"data"


def test_a_share_that_is_unmounted_in_the_middle_of_a_write_is_not_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was opened before is what is written to: nothing comes to lie under the mount point."""
    store, share = folder_at(tmp_path)
    mkdir = os.mkdir

    def unmounting(path: str, mode: int, *, dir_fd: int | None = None) -> None:
        if not (tmp_path / "away").exists():
            share.rename(tmp_path / "away")
            mkdir(share)
        mkdir(path, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", unmounting)
    create(store, "a/1")
    assert list(share.iterdir()) == []


@pytest.mark.parametrize("call", ["mkdir", "write", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_share_is_an_error_of_its_own_and_holds_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """Whichever call is told so: NFS says it at the sync. With room again the same object is written."""
    store, share = folder_at(tmp_path)

    def refuse(*given: object, **named: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(RemoteFullError, match="evict --remote"):
            create(store, "ns/ab/key")
    assert [one.name for one in share.rglob("*") if one.is_file()] == [MARKER]
    assert create(store, "ns/ab/key")


def test_a_share_that_hangs_holds_four_threads_and_then_fails_at_once(tmp_path: Path) -> None:
    """Later calls need no thread; when it answers again, so do they."""
    readers = Readers(THREADS_MAX)
    store, _ = folder_at(tmp_path, readers=readers)
    hang, before = threading.Event(), threading.active_count()
    fsync = os.fsync

    def hanging(fd: int) -> None:
        hang.wait(LONG_S)
        fsync(fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", hanging)
        with ThreadPoolExecutor(6) as pool:
            while store.stuck < THREADS_MAX:  # a call whose time is over before a thread begins it holds none
                calls = [pool.submit(store.create, f"a/{one}", [memoryview(b"x")], Deadline(0.2)) for one in range(6)]
                for call in calls:
                    with pytest.raises(DeadlineError):
                        call.result()
        assert store.stuck == THREADS_MAX
        started_s = time.monotonic()
        with pytest.raises(DeadlineError):
            store.head(["a/1"], soon())
        assert time.monotonic() - started_s < LONG_S / 2
        assert threading.active_count() <= before + THREADS_MAX
        hang.set()
        while store.stuck:
            time.sleep(0.01)
    assert create(store, "b/1")


def test_what_a_killed_writer_left_in_a_folder_is_no_object_and_goes(tmp_path: Path) -> None:
    """Nor are the names that file systems add."""
    store, share = folder_at(tmp_path)
    create(store, "ns/ab/key")
    for name in ("ns/ab/key2.0123456789abcdef.tmp", "ns/ab/._key", "ns/.DS_Store", "ns/ab/UPPER"):
        (share / name).write_bytes(b"half")
    assert [one.name for one in store.names("", "", soon())] == ["ns/ab/key"]
    assert store.sweep(3600, soon()) == 0
    assert store.sweep(0, soon()) == 1
    assert not (share / "ns/ab/key2.0123456789abcdef.tmp").exists()
    assert (share / "ns/ab/._key").exists()


def test_a_link_in_a_folder_is_no_object(tmp_path: Path) -> None:
    """Whoever else writes to the share cannot point us elsewhere."""
    store, share = folder_at(tmp_path)
    create(store, "a/1", b"inside")
    (tmp_path / "secret").write_bytes(b"secret")
    (share / "a/2").symlink_to(tmp_path / "secret")
    assert store.head(["a/2"], soon()) == [None]
    with pytest.raises(RemoteError):
        store.read("a/2", "x", [ByteRange(0, 1)], soon())


def test_a_folder_gives_its_names_in_pages(tmp_path: Path) -> None:
    """Of PAGE_NAMES_MAX."""
    store, share = folder_at(tmp_path)
    for shard in ("aa", "bb"):
        (share / shard).mkdir()
        for one in range(PAGE_NAMES_MAX // 2 + 10):
            (share / shard / f"{one:04}").touch()
    found: list[str] = []
    pages = 0
    while page := store.names("", found[-1] if found else "", soon()):
        found += [one.name for one in page]
        pages += 1
    assert pages == 2
    assert found == sorted(found)
    assert len(set(found)) == PAGE_NAMES_MAX + 20
    assert MARKER not in found
