"""Encrypted namespaces: nothing readable at rest, the same answers, and nothing at all once the key is dropped."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.blobs.encrypted import HEADER_BYTES
from kvstore.blobs.format import FORMAT_VERSION
from kvstore.core.blocks import BLOCK_TOKENS, Reason, pack_tokens
from kvstore.core.keys import Chain
from kvstore.engine import Engine, Fs, Match, NamespaceKey, Selection, check_directory
from kvstore.errors import CorruptDataError, DirectoryError, NotFoundError
from kvstore.index.rows import LEVEL_TOKENS
from tests.support.engine import (
    HYBRID,
    blob_path,
    blob_paths,
    checkpoint,
    find,
    namespace,
    options,
    put,
    put_checkpoint,
    require_right,
    sequence,
    values,
)
from tests.support.files import contents_below

MASTER = bytes(range(32))
NS = namespace("secret")
PLAIN = namespace("open")
# Until its first commit a key is where somebody holds it, as an upload does.
HELD: list[NamespaceKey | None] = []
# Token ids that occur nowhere by chance.
CANARY = [0x5EC2E700 + 7919 * number for number in range(700)]


def opened(path: Path, master: bytes = MASTER) -> Engine:
    """An engine with a master key, in which NS is encrypted."""
    engine = Engine.open(path / "data", options(master_key=master, keys_dir=path / "keys"))
    if master:
        HELD.append(engine.encrypt(NS.root))
    return engine


def bytes_at_rest(path: Path) -> bytes:
    """Everything in the data directory."""
    return b"".join(contents_below(path).values())


def test_neither_tokens_nor_values_of_an_encrypted_namespace_are_readable_at_rest(tmp_path: Path) -> None:
    """Of a plain one beside it both are: the search itself works."""
    plain_tokens = [token + 1 for token in CANARY]
    with opened(tmp_path) as engine:
        put(engine, NS, CANARY)
        put(engine, PLAIN, plain_tokens)
        find(engine, NS, CANARY)
        engine.touch(find(engine, NS, CANARY).slices)
    rest = bytes_at_rest(tmp_path / "data")
    for tokens, there in ((CANARY, False), (plain_tokens, True)):
        packed = pack_tokens(tokens)
        assert (packed[:8] in rest) is there
        assert (packed[8 * 300 : 8 * 301] in rest) is there
        assert (values(packed[: 8 * BLOCK_TOKENS] + b"\0", 4096).tobytes()[:32] in rest) is there
    assert MASTER not in rest


def test_encrypted_and_plain_namespaces_give_the_same_hits(tmp_path: Path) -> None:
    """Whole, prefix, longer, and after a restart; the values are verified by `find`."""
    with opened(tmp_path) as engine:
        assert put(engine, NS, CANARY).blocks == 3
        for tokens, n_tokens in ((CANARY, 700), (CANARY[:512], 512), (CANARY[:600], 600), ([*CANARY, 1, 2], 700)):
            assert find(engine, NS, tokens).n_tokens == n_tokens
        diverging = [*CANARY[:640], *range(90)]
        assert find(engine, NS, diverging).n_tokens == 640
        assert find(engine, NS, [5, *CANARY]).n_tokens == 0
    with opened(tmp_path) as engine:
        assert find(engine, NS, CANARY).n_tokens == 700
        longer = [*CANARY, *range(40)]
        put(engine, NS, longer)
        assert find(engine, NS, longer).n_tokens == 740
        assert len(blob_paths(tmp_path / "data")) == 3  # the shorter tail is gone
        assert engine.check().findings == []


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.data())
def test_a_hit_is_at_most_31_tokens_shorter_than_in_a_plain_namespace(
    tmp_path_factory: pytest.TempPathFactory, seed: int, data: st.DataObject
) -> None:
    """Where prompts diverge within a block, and never a token too many."""
    rng = random.Random(seed)
    stems = [[rng.randrange(3) for _ in range(rng.randrange(1, 700))] for _ in range(3)]
    stored = [stem[: rng.randrange(1, len(stem) + 1)] + [9] * rng.randrange(0, 300) for stem in stems for _ in range(2)]
    folder = tmp_path_factory.mktemp("encrypted")
    with opened(folder) as engine:
        for tokens in stored:
            put(engine, NS, tokens)
            put(engine, PLAIN, tokens)
        for stem in stems:
            query = stem[: data.draw(st.integers(1, len(stem)))] + [7] * data.draw(st.integers(0, 40))
            encrypted, plain = find(engine, NS, query).n_tokens, find(engine, PLAIN, query).n_tokens
            assert plain - LEVEL_TOKENS < encrypted <= plain


def test_checkpoints_of_an_encrypted_namespace_come_back(tmp_path: Path) -> None:
    """Their bytes are encrypted like all others."""
    ns = namespace("secret", HYBRID)
    with Engine.open(tmp_path / "data", options(master_key=MASTER, keys_dir=tmp_path / "keys")) as engine:
        HELD.append(engine.encrypt(ns.root))
        put(engine, ns, CANARY)
        put_checkpoint(engine, ns, CANARY[:600])
        match = engine.match(Chain(ns.root, pack_tokens(CANARY)), exact=True)
        assert match.n_tokens == 600
        require_right(engine, match, pack_tokens(CANARY[:600]))
        state = bytes(memoryview(checkpoint(ns, CANARY[:600]).buffers[0]))
    assert state not in bytes_at_rest(tmp_path / "data")


@pytest.mark.parametrize("at", [3, 60, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 700, -1])
def test_a_changed_byte_anywhere_in_an_encrypted_blob_is_found(tmp_path: Path, at: int) -> None:
    """Header, first chunk, tag: read back, it is damage, and check finds it."""
    with opened(tmp_path) as engine:
        put(engine, NS, CANARY)
        match = find(engine, NS, CANARY)
        path = blob_path(engine, match.slices[1].row)
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
        with pytest.raises(CorruptDataError):
            require_right(engine, match, pack_tokens(CANARY))
        assert [finding.kind for finding in engine.check().findings] == ["corrupt_blob"]
        assert engine.recheck(match.slices[1].row.key)
        assert find(engine, NS, CANARY).n_tokens == BLOCK_TOKENS


def test_a_blob_in_another_ones_place_is_found(tmp_path: Path) -> None:
    """Both are whole, encrypted with the namespace's key and of one size."""
    other = [token + 3 for token in CANARY]
    with opened(tmp_path) as engine:
        put(engine, NS, CANARY[:256])
        put(engine, NS, other[:256])
        (first,), (second,) = (find(engine, NS, tokens[:256]).slices for tokens in (CANARY, other))
        data = blob_path(engine, second.row).read_bytes()
        blob_path(engine, first.row).write_bytes(data)
        with pytest.raises(CorruptDataError, match="another blob"):
            find(engine, NS, CANARY[:256])
        assert [finding.kind for finding in engine.check(repair=True).findings] == ["corrupt_blob"]
        assert find(engine, NS, CANARY[:256]).n_tokens == 0
        assert find(engine, NS, other[:256]).n_tokens == 256


def test_a_lost_index_is_rebuilt_from_encrypted_blobs(tmp_path: Path) -> None:
    """With the key; offline too."""
    with opened(tmp_path) as engine:
        put(engine, NS, CANARY)
    for file in (tmp_path / "data" / "index").iterdir():
        file.unlink()
    assert check_directory(tmp_path / "data", repair=True, master_key=MASTER, keys_dir=tmp_path / "keys").blobs == 3
    with opened(tmp_path) as engine:
        assert find(engine, NS, CANARY).n_tokens == 700
    assert pack_tokens(CANARY)[:8] not in bytes_at_rest(tmp_path / "data")


def test_a_dropped_key_makes_all_of_it_a_miss_at_once_and_for_good(tmp_path: Path) -> None:
    """What was stored is not read again, is evicted like anything else, and the namespace can be filled anew."""
    with opened(tmp_path) as engine:
        put(engine, NS, CANARY)
        put(engine, PLAIN, CANARY)
        kept = engine.match(Chain(NS.root, pack_tokens(CANARY)))
        assert engine.shred(NS.root[:4], dry_run=True) == 1
        assert engine.shred(NS.root[:4]) == 1
        assert engine.shred(NS.root[:4]) == 0
        assert find(engine, NS, CANARY).n_tokens == 0
        assert find(engine, PLAIN, CANARY).n_tokens == 700
        with pytest.raises((CorruptDataError, NotFoundError, AssertionError)):
            require_right(engine, kept, pack_tokens(CANARY))
    with opened(tmp_path) as engine:  # with a new key, that opens nothing of before
        assert find(engine, NS, CANARY).n_tokens == 0
        assert {finding.kind for finding in engine.check().findings} == {"shredded"}
        assert engine.evict(Selection(namespace_prefix=NS.root[:4])).blocks == 3
        assert engine.check().findings == []
        assert len(blob_paths(tmp_path / "data")) == 3
        assert find(engine, PLAIN, CANARY).n_tokens == 700
        put(engine, NS, CANARY)
        assert find(engine, NS, CANARY).n_tokens == 700
        assert engine.check().findings == []


def test_a_checkpoint_whose_key_was_dropped_is_no_checkpoint(tmp_path: Path) -> None:
    """Also at the end of a full block, where it has no tokens of its own that could differ."""
    ns, tokens = namespace("secret", HYBRID), CANARY[:512]
    with Engine.open(tmp_path / "data", options(master_key=MASTER, keys_dir=tmp_path / "keys")) as engine:
        HELD.append(engine.encrypt(ns.root))
        put(engine, ns, tokens)
        put_checkpoint(engine, ns, tokens)
        assert engine.checkpoint_at(Chain(ns.root, pack_tokens(tokens))) is not None
        engine.shred(ns.root)
        HELD.append(engine.encrypt(ns.root))
        put(engine, ns, tokens)
        assert engine.checkpoint_at(Chain(ns.root, pack_tokens(tokens))) is None
        assert engine.match(Chain(ns.root, pack_tokens(tokens)), exact=True).n_tokens == 0
        put_checkpoint(engine, ns, tokens)
        match = engine.match(Chain(ns.root, pack_tokens(tokens)), exact=True)
        assert match.checkpoint is not None
        require_right(engine, match, pack_tokens(tokens))


def test_a_store_that_was_under_way_when_the_key_was_dropped_leaves_nothing(tmp_path: Path) -> None:
    """Neither a plain row nor a file."""
    with opened(tmp_path) as engine:

        def blocks():  # type: ignore[no-untyped-def]
            for number, block in enumerate(sequence(NS, CANARY)):
                if number == 2:
                    assert engine.shred(NS.root) in (0, 1)
                    engine._shared.index.ring.drop(NS.root)
                yield block

        receipt = engine.store(NS.to_record(), blocks())
        assert (receipt.new_bytes, receipt.reason) == (0, Reason.DEPENDENCY_LOST)
        assert not blob_paths(tmp_path / "data")
    assert pack_tokens(CANARY)[:8] not in bytes_at_rest(tmp_path / "data")


def test_a_directory_with_encrypted_namespaces_needs_their_master_key(tmp_path: Path) -> None:
    """Without it, or with another, the start is refused and nothing is changed."""
    with opened(tmp_path) as engine:
        put(engine, NS, CANARY)
    for master in (b"", bytes(32)):
        with pytest.raises(DirectoryError, match="encryption key"):
            Engine.open(tmp_path / "data", options(master_key=master, keys_dir=tmp_path / "keys"))
    with opened(tmp_path) as engine:
        assert find(engine, NS, CANARY).n_tokens == 700


def test_a_namespace_that_holds_plain_blocks_stays_plain(tmp_path: Path) -> None:
    """Encryption begins with an empty namespace, so no row of it is ever of the other kind."""
    with Engine.open(tmp_path / "data", options(master_key=MASTER, keys_dir=tmp_path / "keys")) as engine:
        put(engine, NS, CANARY)
        assert engine.encrypt(NS.root) is None
        assert not engine.is_encrypted(NS.root)
        assert find(engine, NS, CANARY).n_tokens == 700
    with Engine.open(tmp_path / "data", options()) as engine, pytest.raises(NotFoundError):
        engine.encrypt(PLAIN.root)


def test_a_plain_blob_planted_in_an_encrypted_namespace_is_not_taken_for_one_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever can write to the directory cannot make the store answer with rows of their own."""
    with Engine.open(tmp_path / "other", options()) as engine:
        put(engine, NS, CANARY[:256])
        (planted,) = (blob_path(engine, part.row) for part in find(engine, NS, CANARY[:256]).slices)
    with opened(tmp_path) as engine:
        put(engine, PLAIN, CANARY[:256])
        target = tmp_path / "data" / planted.relative_to(tmp_path / "other")
        target.parent.mkdir(mode=0o700, exist_ok=True)
        target.write_bytes(planted.read_bytes())
        assert [finding.kind for finding in engine.check(repair=True).findings] == ["corrupt_blob"]
        assert f"{target} goes to quarantine: " in caplog.text
        assert find(engine, NS, CANARY[:256]).n_tokens == 0
        assert not target.exists()


def test_an_encrypted_blob_that_names_another_namespace_is_damaged(tmp_path: Path) -> None:
    """Its header is bound to what it holds."""
    with opened(tmp_path) as engine:
        put(engine, NS, CANARY)
        row = find(engine, NS, CANARY).slices[1].row
        path = blob_path(engine, row)
        path.write_bytes(path.read_bytes().replace(NS.root.hex().encode(), bytes(32).hex().encode()))
        assert engine.recheck(row.key) and not path.exists()
        assert find(engine, NS, CANARY).reason is Reason.CORRUPT


def test_an_encrypted_blob_of_another_format_version_is_left_alone(tmp_path: Path) -> None:
    """By a report of damage and by a repair, although the version that it names is all that differs."""
    with opened(tmp_path) as engine:
        put(engine, NS, CANARY)
        row = find(engine, NS, CANARY).slices[1].row
        path = blob_path(engine, row)
        left = path.read_bytes().replace(b'"version":"%d"' % FORMAT_VERSION, b'"version":"9"')
        path.write_bytes(left)
        assert not engine.recheck(row.key)
        assert [finding.kind for finding in engine.check(repair=True).findings] == ["unknown_format"]
        assert path.read_bytes() == left != b""


def test_a_key_without_a_block_is_dropped_too(tmp_path: Path) -> None:
    """A namespace may be encrypted before its first store ends."""
    with opened(tmp_path) as engine:
        assert engine.shred(NS.root[:4]) == 1
        assert not engine.is_encrypted(NS.root)
        assert list((tmp_path / "keys").rglob("*.json")) == []


def key_files(engine: Engine) -> list[Path]:
    """What is in the folder of keys."""
    return sorted(engine._shared.directory.keys.glob("*"))


def first_bytes(engine: Engine, match: Match) -> bytes:
    """The beginning of the values of a match."""
    into = bytearray(4096)
    with contextlib.closing(engine.reader(match.slices)) as reader:
        reader.readinto(0, 0, [memoryview(into)])
    return bytes(into)


def test_who_only_asks_leaves_no_key_behind(tmp_path: Path) -> None:
    """Neither on disk nor, once nobody holds it, in memory; those who hold it share one."""
    with Engine.open(tmp_path / "data", options(master_key=MASTER, keys_dir=tmp_path / "keys")) as engine:
        for number in range(100):
            engine.encrypt(namespace(f"asked {number}").root)
        gc.collect()
        assert key_files(engine) == []
        assert engine._shared.index.ring.roots == []
        key = engine.encrypt(NS.root)
        assert key is not None and key is engine.encrypt(NS.root)
        assert key_files(engine) == []
        assert engine.store(NS.to_record(), sequence(NS, CANARY), encryption=key).blocks == 3
        assert len(key_files(engine)) == 1
    with Engine.open(tmp_path / "data", options(master_key=MASTER, keys_dir=tmp_path / "keys")) as engine:
        assert find(engine, NS, CANARY).n_tokens == 700


def test_the_key_goes_with_the_last_block_of_its_namespace(tmp_path: Path) -> None:
    """And comes back with the next; uploads and fetches under way keep what they had."""
    with opened(tmp_path) as engine:
        put(engine, NS, CANARY)
        put(engine, PLAIN, CANARY)
        match = find(engine, NS, CANARY)
        there = first_bytes(engine, match)
        with engine.lease([part.row for part in match.slices]):
            assert engine.evict(Selection(namespace_prefix=NS.root[:4])).blocks == 3
            assert key_files(engine) == []
            HELD.clear()
            gc.collect()
            assert first_bytes(engine, match) == there
            key = engine.encrypt(NS.root)
        assert engine.store(NS.to_record(), sequence(NS, CANARY), encryption=key).reason is Reason.OK
        assert len(key_files(engine)) == 1
        assert find(engine, NS, CANARY).n_tokens == 700


def test_an_upload_begun_before_a_shred_is_not_stored_under_a_later_key(tmp_path: Path) -> None:
    """Nor plain, nor under the old one: also when nothing of the namespace had been written yet."""
    with Engine.open(tmp_path / "data", options(master_key=MASTER, keys_dir=tmp_path / "keys")) as engine:
        old = engine.encrypt(NS.root)
        assert engine.shred(NS.root) == 1
        new = engine.encrypt(NS.root)
        assert new is not None and new is not old
        receipt = engine.store(NS.to_record(), sequence(NS, CANARY), encryption=old)
        assert (receipt.new_bytes, receipt.reason) == (0, Reason.DEPENDENCY_LOST)
        assert not blob_paths(tmp_path / "data") and not key_files(engine)
        assert engine.store(NS.to_record(), sequence(NS, CANARY), encryption=new).reason is Reason.OK


@pytest.mark.parametrize("at", ["key", "commit"])
def test_a_crash_before_the_first_commit_leaves_no_key(tmp_path: Path, at: str) -> None:
    """Whether it comes before the key's file or between that and the index."""

    class Stops(Fs):
        def rename(self, source: str, target: str) -> None:
            if at == "key" and target.endswith(".json"):
                raise KeyboardInterrupt
            super().rename(source, target)

        def commit(self, commit: Callable[[], None]) -> None:
            if at == "commit" and any((tmp_path / "keys").rglob("*.json")):
                raise KeyboardInterrupt
            super().commit(commit)

    engine = Engine.open(tmp_path / "data", options(master_key=MASTER, keys_dir=tmp_path / "keys"), fs=Stops())
    key = engine.encrypt(NS.root)
    with pytest.raises(KeyboardInterrupt):
        engine.store(NS.to_record(), sequence(NS, CANARY), encryption=key)
    assert len(list((tmp_path / "keys").rglob("*.json"))) == (at == "commit")
    engine._shared.index.close()
    engine._held.close()
    with opened(tmp_path) as engine:
        assert key_files(engine) == []
        assert find(engine, NS, CANARY).n_tokens == 0
        assert put(engine, NS, CANARY).reason is Reason.OK
        assert engine.check().findings == []


class Balks(Fs):
    """While `on`, calls of `refused` that are about keys fail."""

    def __init__(self, *refused: str) -> None:
        self.refused = refused
        self.on = False

    def _demand(self, call: str, path: str) -> None:
        if self.on and call in self.refused and "/keys" in path:
            raise OSError(errno.EIO, call)

    def rename(self, source: str, target: str) -> None:
        """As the name says."""
        self._demand("rename", target)
        super().rename(source, target)

    def unlink(self, path: str) -> None:
        """As the name says."""
        self._demand("unlink", path)
        super().unlink(path)

    def fsync_dir(self, path: str) -> None:
        """As the name says."""
        self._demand("fsync_dir", path)
        super().fsync_dir(path)


@pytest.mark.parametrize("call", ["unlink", "fsync_dir"])
def test_a_key_that_went_only_in_part_is_written_again(tmp_path: Path, call: str) -> None:
    """Else what is stored under it next would be gone with the next start: its file is overwritten, or gone."""
    fs = Balks(call)
    with Engine.open(tmp_path / "data", options(master_key=MASTER, keys_dir=tmp_path / "keys"), fs=fs) as engine:
        key = engine.encrypt(NS.root)
        assert engine.store(NS.to_record(), sequence(NS, CANARY), encryption=key).blocks == 3
        fs.on = True
        assert engine.evict(Selection(namespace_prefix=NS.root[:4])).blocks == 3
        fs.on = False
        assert engine.store(NS.to_record(), sequence(NS, CANARY), encryption=key).blocks == 3
        assert len(key_files(engine)) == 1
    del key
    with Engine.open(tmp_path / "data", options(master_key=MASTER, keys_dir=tmp_path / "keys")) as engine:
        assert find(engine, NS, CANARY).n_tokens == 700
        engine.evict(Selection(namespace_prefix=NS.root[:4]))
        assert key_files(engine) == []


def test_a_key_that_did_not_go_goes_with_a_later_commit(tmp_path: Path) -> None:
    """Also one that nobody holds any more."""
    fs = Balks("unlink")
    with Engine.open(tmp_path / "data", options(master_key=MASTER, keys_dir=tmp_path / "keys"), fs=fs) as engine:
        assert engine.store(NS.to_record(), sequence(NS, CANARY), encryption=engine.encrypt(NS.root)).blocks == 3
        fs.on = True
        engine.evict(Selection(namespace_prefix=NS.root[:4]))
        assert len(key_files(engine)) == 1
        fs.on = False
        put(engine, PLAIN, CANARY)
        assert key_files(engine) == []


@pytest.mark.parametrize("refused", [("rename", "unlink"), ("fsync_dir",)])
def test_a_key_that_could_not_be_written_is_written_by_the_next_store(tmp_path: Path, refused: tuple[str, ...]) -> None:
    """Whatever the first attempt left in the folder."""
    fs = Balks(*refused)
    with Engine.open(tmp_path / "data", options(master_key=MASTER, keys_dir=tmp_path / "keys"), fs=fs) as engine:
        key = engine.encrypt(NS.root)
        fs.on = True
        assert engine.store(NS.to_record(), sequence(NS, CANARY), encryption=key).reason is Reason.STORE_FULL
        fs.on = False
        assert engine.store(NS.to_record(), sequence(NS, CANARY), encryption=key).reason is Reason.OK
        assert len(key_files(engine)) == 1
    del key
    with Engine.open(tmp_path / "data", options(master_key=MASTER, keys_dir=tmp_path / "keys")) as engine:
        assert find(engine, NS, CANARY).n_tokens == 700


def test_a_shred_that_failed_is_done_by_the_next(tmp_path: Path) -> None:
    """Nobody reads the namespace meanwhile, but its file is there, and a start would take the key from it."""
    fs = Balks("unlink")
    with Engine.open(tmp_path / "data", options(master_key=MASTER, keys_dir=tmp_path / "keys"), fs=fs) as engine:
        receipt = engine.store(NS.to_record(), sequence(NS, CANARY), encryption=engine.encrypt(NS.root))
        assert receipt.blocks == 3
        fs.on = True
        with pytest.raises(OSError, match="unlink"):
            engine.shred(NS.root)
        assert find(engine, NS, CANARY).n_tokens == 0
        assert len(key_files(engine)) == 1
        fs.on = False
        assert engine.shred(NS.root) == 1
        assert key_files(engine) == []


def test_an_orderly_stop_vouches_for_keys_that_no_store_synced(tmp_path: Path) -> None:
    """As for the blobs, of which nothing can be read without them."""
    synced: list[int] = []

    class Watched(Fs):
        def fsync(self, fd: int) -> None:
            """Remember which file it is."""
            synced.append(os.fstat(fd).st_ino)
            super().fsync(fd)

    with Engine.open(tmp_path / "data", options(master_key=MASTER, durability="none"), fs=Watched()) as engine:
        engine.store(NS.to_record(), sequence(NS, CANARY), encryption=engine.encrypt(NS.root))
        [path] = key_files(engine)
        assert path.stat().st_ino not in synced
    assert path.stat().st_ino in synced


def test_nothing_is_stored_once_the_keys_were_deleted_underneath(tmp_path: Path) -> None:
    """Under a key that is in memory only it would be gone with the next start. After an eviction it goes on."""
    with opened(tmp_path) as engine:
        put(engine, NS, CANARY[:512])
        shutil.rmtree(tmp_path / "keys")
        assert put(engine, NS, CANARY).reason is Reason.STORE_FULL
        assert engine.is_displaced()
    HELD.clear()
    gc.collect()
    with opened(tmp_path, b"") as engine:
        assert engine.match(Chain(NS.root, pack_tokens(CANARY))).reason is Reason.KEY_MISSING
    with Engine.open(tmp_path / "data", options(master_key=MASTER, keys_dir=tmp_path / "keys")) as engine:
        engine.evict(Selection(namespace_prefix=NS.root))
        HELD.append(engine.encrypt(NS.root))
        assert find(engine, NS, CANARY).n_tokens == 0
        assert put(engine, NS, CANARY).reason is Reason.OK
        assert find(engine, NS, CANARY).n_tokens == 700
