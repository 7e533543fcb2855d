"""What every blob store promises, wherever its bytes lie. A new one adds itself to MAKERS and inherits the rest."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.blobs.encrypted import CHUNK_BYTES, EncryptedBlobs
from kvstore.blobs.format import aux_block, make_ready
from kvstore.blobs.fs import Fs
from kvstore.blobs.local import LocalBlobs
from kvstore.blobs.memory import MemoryBlobs
from kvstore.blobs.protocol import BlobId, Blobs, Source
from kvstore.core.keys import aux_key
from kvstore.engine.adopt import read_block
from kvstore.errors import CorruptDataError
from tests.support.engine import namespace

ROOT, OTHER = bytes(range(32)), bytes(32)
SECRET = b"what the prompt said" * 50


class OneKey:
    """ROOT and OTHER are encrypted."""

    def blob_cipher(self, salt: bytes) -> AESGCM:
        """Of the salt alone."""
        return AESGCM(salt * 2)

    def key(self, root: bytes) -> OneKey | None:
        """The same for all."""
        return self


class FailingFs(Fs):
    """Fails at the n-th call that changes the disk."""

    def __init__(self) -> None:
        self.left = -1
        self.error = errno.ENOSPC

    def _count(self) -> None:
        if self.left == 0:
            raise OSError(self.error, "the disk refuses")
        self.left -= 1

    def open(self, path: str, flags: int, mode: int) -> int:
        self._count()
        return super().open(path, flags, mode)

    def write(self, fd: int, data: memoryview) -> int:
        self._count()
        return super().write(fd, data[: 1 + len(data) // 2])

    def fsync(self, fd: int) -> None:
        self._count()
        super().fsync(fd)

    def rename(self, source: str, target: str) -> None:
        self._count()
        super().rename(source, target)

    def mkdir(self, path: str) -> None:
        self._count()
        super().mkdir(path)

    def fsync_dir(self, path: str) -> None:
        self._count()
        super().fsync_dir(path)


@dataclass
class Place:
    """A blob store under test; `directory` where it has one."""

    blobs: Blobs
    fs: FailingFs
    directory: Path | None = None


def _local(tmp: Path) -> Place:
    directory, fs = tmp / "blobs.noindex", FailingFs()
    directory.mkdir(parents=True)
    return Place(LocalBlobs(directory, tmp / "quarantine", fs), fs, directory)


def _encrypted(make: Callable[[Path], Place]) -> Callable[[Path], Place]:
    def wrap(tmp: Path) -> Place:
        place = make(tmp)
        return Place(EncryptedBlobs(place.blobs, OneKey()), place.fs, place.directory)

    return wrap


MAKERS: dict[str, Callable[[Path], Place]] = {
    "local": _local,
    "memory": lambda tmp: Place(MemoryBlobs(), FailingFs()),
    "encrypted local": _encrypted(_local),
    "encrypted memory": _encrypted(lambda tmp: Place(MemoryBlobs(), FailingFs())),
}


@pytest.fixture(params=MAKERS, ids=lambda name: name.replace(" ", "-"))
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Each of them, empty."""
    return MAKERS[request.param](tmp_path)


def blob(number: int, root: bytes = ROOT) -> BlobId:
    """One of many."""
    return BlobId(root, number.to_bytes(32, "big"), number)


def put(place: Place, one: BlobId, data: bytes, parts: int = 1) -> None:
    """Store it durably, in so many pieces."""
    step = -(-len(data) // parts) or 1
    pending = place.blobs.put(one, [memoryview(data)[at : at + step] for at in range(0, len(data), step)])
    pending.sync()
    pending.rename()
    place.blobs.sync(one.root)


def read(place: Place, one: BlobId, nbytes: int, offset: int = 0, payload: int = 0, size: int = -1) -> bytes:
    """A range of it."""
    view = bytearray(nbytes)
    with closing(
        place.blobs.reader([Source(one, payload, place.blobs.size(one) or 0 if size < 0 else size)], 4)
    ) as reader:
        reader.readinto(0, offset, [memoryview(view)])
    return bytes(view)


def listed(place: Place, root: bytes | None = None) -> dict[BlobId | None, int]:
    """Names and sizes; what is unfinished or foreign has none."""
    return {None if entry.is_unfinished else entry.blob: entry.nbytes for entry in place.blobs.names(root)}


@given(data=st.binary(min_size=1, max_size=3 * CHUNK_BYTES // 2), cuts=st.data(), parts=st.integers(1, 5))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("name", MAKERS)
def test_every_range_of_what_was_put_comes_back(
    name: str, data: bytes, cuts: st.DataObject, parts: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the pieces that it was put in, and the views that it is read into."""
    place = MAKERS[name](tmp_path_factory.mktemp("blobs"))
    put(place, blob(1), data, parts)
    start = cuts.draw(st.integers(0, len(data)))
    payload = cuts.draw(st.integers(0, start))
    end = cuts.draw(st.integers(start, len(data)))
    middle = cuts.draw(st.integers(start, end))
    views = [memoryview(bytearray(middle - start)), memoryview(bytearray(end - middle))]
    with closing(place.blobs.reader([Source(blob(1), payload, len(data))], 1)) as reader:
        reader.readinto(0, start - payload, views)
    assert b"".join(views) == data[start:end]


def test_a_blob_has_no_name_before_it_lands(place: Place) -> None:
    """And abandoning it leaves nothing."""
    pending = place.blobs.put(blob(1), [memoryview(b"abc")])
    assert place.blobs.size(blob(1)) is None
    assert blob(1) not in listed(place)
    pending.sync()
    assert blob(1) not in listed(place)
    pending.rename()
    assert place.blobs.size(blob(1)) == 3
    for is_synced in (False, True):
        given_up = place.blobs.put(blob(2), [memoryview(b"abc")])
        if is_synced:
            given_up.sync()
        given_up.abandon()
        given_up.abandon()
    assert listed(place) == {blob(1): 3}


def test_names_are_listed_by_namespace_with_the_sizes_that_readers_see(place: Place) -> None:
    """All of them, too."""
    put(place, blob(1), b"x" * 70_000)
    put(place, blob(2, OTHER), b"y" * 5)
    assert listed(place, ROOT) == {blob(1): 70_000}
    assert listed(place, OTHER) == {blob(2, OTHER): 5}
    assert listed(place) == {blob(1): 70_000, blob(2, OTHER): 5}
    assert (place.blobs.size(blob(1)), place.blobs.size(blob(3))) == (70_000, None)


def test_what_is_deleted_is_gone_and_deleting_again_is_no_error(place: Place) -> None:
    """Its reader says corrupt: a miss."""
    put(place, blob(1), b"abc")
    put(place, blob(2), b"def")
    assert place.blobs.delete([blob(1), blob(7)]) == []
    assert listed(place) == {blob(2): 3}
    with pytest.raises(CorruptDataError):
        read(place, blob(1), 1, size=3)


def test_dropping_a_namespace_takes_all_its_names_at_once(place: Place) -> None:
    """Other namespaces stay; `clear` frees the bytes, a few files at a time; the namespace may be used again."""
    for number in range(5):
        put(place, blob(number), b"z" * 5000)
    put(place, blob(1, OTHER), b"stays")
    place.blobs.drop(ROOT)
    assert listed(place) == {blob(1, OTHER): 5}
    assert place.blobs.overhead_bytes >= 5 * place.blobs.stored_bytes(ROOT, 5000)
    put(place, blob(9), b"again")
    freed = [place.blobs.clear(2) for _ in range(4)]
    assert sum(freed) == 5 * place.blobs.stored_bytes(ROOT, 5000) and freed[-1] == 0
    assert place.blobs.overhead_bytes < 5 * place.blobs.stored_bytes(ROOT, 5000)
    assert listed(place) == {blob(1, OTHER): 5, blob(9): 5}


@pytest.mark.parametrize(("offset", "nbytes", "size"), [(2, 2, 3), (0, 4, 3), (0, 1, 4), (0, 1, 2), (-1, 1, 3)])
def test_a_range_that_is_not_there_is_corrupt(place: Place, offset: int, nbytes: int, size: int) -> None:
    """Beyond the end, or of a blob of another size than the index says."""
    put(place, blob(1), b"abc")
    with pytest.raises(CorruptDataError):
        read(place, blob(1), nbytes, offset, size=size)


def test_what_is_put_in_quarantine_has_no_name_any_more(place: Place) -> None:
    """By its entry or its id; a person may look at it."""
    put(place, blob(1), b"abc")
    put(place, blob(2), b"abc")
    [entry] = [entry for entry in place.blobs.names() if entry.blob == blob(1)]
    for what in (entry, entry, blob(2), blob(2)):
        place.blobs.quarantine(what)
    assert listed(place) == {}
    if place.directory is not None:
        assert len(list((place.directory.parent / "quarantine").iterdir())) == 2
    count, nbytes = place.blobs.quarantined()
    assert count == 2 and nbytes == 2 * place.blobs.stored_bytes(ROOT, 3)
    place.blobs.trim_quarantine(3)
    assert place.blobs.quarantined() == (2, nbytes)
    place.blobs.trim_quarantine(1)
    assert place.blobs.quarantined()[0] == 1


def test_a_blob_store_says_what_may_still_be_written(place: Place) -> None:
    """Bytes, and names."""
    free_bytes, free_names = place.blobs.room()
    assert free_bytes > 0 and free_names > 0


@pytest.mark.parametrize("name", ["local", "encrypted local"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_write_that_fails_anywhere_leaves_nothing_or_the_whole_blob(name: str, code: int, tmp_path: Path) -> None:
    """Every call that changes the disk fails once."""
    failed = 0
    for at in range(40):
        place = MAKERS[name](tmp_path / str(at))
        place.fs.left, place.fs.error = at, code
        try:
            put(place, blob(1), SECRET, parts=3)
        except OSError:
            failed += 1
        else:
            break
        finally:
            place.fs.left = -1
        assert listed(place) in ({}, {blob(1): len(SECRET)})
        if blob(1) in listed(place):
            assert read(place, blob(1), len(SECRET)) == SECRET
    assert failed > 5


@pytest.mark.parametrize("name", ["local", "encrypted local"])
def test_foreign_names_are_listed_and_never_taken_for_blobs(name: str, tmp_path: Path) -> None:
    """Links are not followed, and a folder of another name is one entry."""
    place = MAKERS[name](tmp_path)
    put(place, blob(1), b"abc")
    assert place.directory is not None
    folder = place.directory / ROOT.hex()
    (folder / "notes.txt").write_text("hello")
    (folder / f"{blob(2).name}.tmp").write_bytes(b"half")
    (folder / f"{'ab' * 32}-{1 << 62}.safetensors").write_bytes(b"a number that no store gives")
    os.symlink("/etc/passwd", folder / blob(3).name)
    (place.directory / "stray").mkdir()
    os.symlink(tmp_path, place.directory / OTHER.hex())
    entries = list(place.blobs.names())
    assert [entry.blob for entry in entries if entry.blob and not entry.is_unfinished] == [blob(1)]
    [unfinished] = [entry for entry in entries if entry.is_unfinished]
    assert (Path(unfinished.place).name, unfinished.blob) == (f"{blob(2).name}.tmp", blob(2))
    # The blob, three files and a link in its folder, a folder and a link beside it.
    assert len(entries) == 7
    assert place.blobs.size(blob(3)) is None
    with pytest.raises(CorruptDataError):
        read(place, blob(3), 1, size=10)


@pytest.mark.parametrize("name", ["local", "encrypted local"])
def test_a_file_that_changed_under_its_reader_is_corrupt(name: str, tmp_path: Path) -> None:
    """Cut short, made longer, or, where it is encrypted, changed at all."""
    place = MAKERS[name](tmp_path)
    put(place, blob(1), SECRET)
    assert place.directory is not None
    path = place.directory / ROOT.hex() / blob(1).name
    whole = path.read_bytes()
    for torn in (whole[:-1], whole + b"x", b""):
        path.write_bytes(torn)
        with pytest.raises(CorruptDataError):
            read(place, blob(1), 10, size=len(SECRET))
    if name.startswith("encrypted"):
        for at in (5, 100, 600, len(whole) - 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(CorruptDataError):
                read(place, blob(1), len(SECRET), size=len(SECRET))


def test_what_is_encrypted_has_no_path_and_tells_nothing(tmp_path: Path) -> None:
    """And a plain blob has the path of its file."""
    plain, hidden = _local(tmp_path / "a"), _encrypted(_local)(tmp_path / "b")
    for place in (plain, hidden):
        put(place, blob(1), SECRET)
    path = plain.blobs.path(blob(1))
    assert path is not None and Path(path).read_bytes() == SECRET
    assert hidden.blobs.path(blob(1)) is None
    assert hidden.directory is not None
    assert SECRET[:20] not in (hidden.directory / ROOT.hex() / blob(1).name).read_bytes()


def test_an_encrypted_blob_under_another_name_is_corrupt(tmp_path: Path) -> None:
    """Its header names the blob that it is."""
    place = _encrypted(_local)(tmp_path)
    put(place, blob(1), SECRET)
    assert place.directory is not None
    folder = place.directory / ROOT.hex()
    (folder / blob(1).name).rename(folder / blob(2).name)
    with pytest.raises(CorruptDataError):
        read(place, blob(2), 1)


def test_an_aux_block_comes_back_verified_and_no_bit_of_it_may_change(place: Place) -> None:
    """Header, checksum and digest, whatever the store does with the bytes between."""
    ns, data = namespace("contract"), bytes(range(256)) * 300
    block = replace(aux_block(ns.root, data), namespace=ns.to_record(), created_s=1_700_000_000)
    assert block.aux is not None and block.key == aux_key(ns.root, block.aux.digest)
    ready, name = make_ready(block, [data]), BlobId(ns.root, block.key, 1)
    put(place, name, ready.header + b"".join(map(bytes, ready.payload)))
    found, source = read_block(place.blobs, name, ready.nbytes, verify=True)
    assert found == ready.block and found.aux is not None and found.aux.digest == hashlib.sha256(data).digest()
    assert read(place, name, len(data), payload=source.payload_offset, size=ready.nbytes) == data
    changed = bytearray(data)
    changed[7] ^= 1
    put(place, name._replace(number=2), ready.header + bytes(changed))
    with pytest.raises(CorruptDataError):
        read_block(place.blobs, name._replace(number=2), ready.nbytes, verify=True)
