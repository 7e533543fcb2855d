"""The engine's verbs on a directory of its own: store, match, replace, reopen, concurrently."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

from kvstore.blobs.protocol import BlobId
from kvstore.blobs.write_behind import WriteBehind
from kvstore.core.blocks import FIDELITY_EXACT, Block, Reason, pack_tokens
from kvstore.core.keys import Chain
from kvstore.engine import Engine, NewBlock, Selection
from kvstore.errors import (
    ConfigError,
    CorruptDataError,
    DirectoryError,
    DirectoryHeldError,
    InvalidRequestError,
    UnknownFormatError,
)
from tests.support.engine import (
    RecordingFs,
    blob_path,
    blob_paths,
    disk_usage,
    find,
    namespace,
    new_block,
    options,
    put,
    require_right,
    require_sound,
    sequence,
)

NS = namespace()
OTHER = namespace("other weights")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """An engine with room for everything."""
    with Engine.open(tmp_path / "data", options()) as opened:
        yield opened


def test_a_stored_sequence_is_found_whole_and_after_a_restart(tmp_path: Path) -> None:
    """Full blocks and a tail come back with their own bytes, also from a new engine."""
    tokens = list(range(600))
    with Engine.open(tmp_path / "data", options()) as engine:
        receipt = put(engine, NS, tokens)
        assert (receipt.blocks, receipt.reason) == (3, Reason.OK)
        assert receipt.new_bytes == engine.stats().stored_bytes == 2 * 12288 + 8192
    with Engine.open(tmp_path / "data", options()) as engine:
        match = find(engine, NS, tokens)
        assert (match.n_tokens, match.reason, match.fidelity) == (600, Reason.OK, FIDELITY_EXACT)
        assert [part.take for part in match.slices] == [256, 256, 88]
        assert engine.namespace(NS.root) == NS.info and [one.info for one in engine.stats().namespaces] == [NS.info]
        require_sound(engine)


@pytest.mark.parametrize("asked", [1, 2, 255, 256, 257, 300, 511, 512, 599, 600, 601, 900])
def test_any_prefix_and_any_continuation_is_a_hit(engine: Engine, asked: int) -> None:
    """Cut anywhere, or going on elsewhere: the longest common prefix is what comes back."""
    put(engine, NS, list(range(600)))
    match = find(engine, NS, list(range(asked)))
    assert match.n_tokens == min(asked, 600)
    assert match.reason is (Reason.OK if asked <= 600 else Reason.UNKNOWN_PREFIX)
    match = find(engine, NS, [*range(min(asked, 600)), -7, -8])
    assert (match.n_tokens, match.reason) == (min(asked, 600), Reason.UNKNOWN_PREFIX)


def test_the_limit_cuts_a_match(engine: Engine) -> None:
    """At the limit the match is complete, whatever is stored beyond it."""
    put(engine, NS, list(range(600)))
    for limit in (0, 1, 255, 256, 257, 599):
        match = find(engine, NS, list(range(600)), limit_tokens=limit)
        assert (match.n_tokens, match.reason) == (limit, Reason.OK)


def test_an_unknown_namespace_is_an_identity_miss(engine: Engine) -> None:
    """Nothing was ever stored under this identity; with one store elsewhere, nothing changes."""
    put(engine, NS, list(range(300)))
    match = find(engine, OTHER, list(range(300)))
    assert (match.n_tokens, match.reason, match.slices) == (0, Reason.IDENTITY, ())
    assert engine.namespace(OTHER.root) is None


def test_extreme_token_ids_are_ordinary_tokens(engine: Engine) -> None:
    """The ends of 64 bits, both sides of zero and of the short code."""
    edges = [0, 1, -1, (1 << 63) - 1, -(1 << 63), (1 << 23) - 1, 1 << 23, -(1 << 31), 1 << 32]
    for first in edges:
        assert put(engine, NS, [first, *edges]).reason is Reason.OK
    for first in edges:
        assert find(engine, NS, [first, *edges, 3]).n_tokens == len(edges) + 1
        assert find(engine, NS, [first, *edges[:4], 77]).n_tokens == 5
    assert find(engine, NS, [99]).n_tokens == 0
    require_sound(engine)


def test_a_longer_block_replaces_the_tails_that_it_covers(engine: Engine) -> None:
    """A conversation that grows keeps one file for its last block; an unrelated tail stays."""
    put(engine, NS, [*range(50), -1])
    for n_tokens in (50, 100, 200, 256, 300):
        put(engine, NS, list(range(n_tokens)))
        assert find(engine, NS, list(range(n_tokens))).n_tokens == n_tokens
    assert sorted(info.row.n_tokens for info in engine.list_blocks()) == [44, 51, 256]
    assert find(engine, NS, [*range(50), -1]).n_tokens == 51
    require_sound(engine)


def test_tails_that_are_longer_than_their_code_are_replaced(engine: Engine) -> None:
    """Index keys hold some 157 tokens; tails beyond that are told apart by their rows."""
    for n_tokens in (170, 200, 201, 255):
        put(engine, NS, list(range(n_tokens)))
        put(engine, NS, [*range(n_tokens - 5), -1, -2])
    assert sorted(info.row.n_tokens for info in engine.list_blocks()) == [167, 197, 198, 252, 255]
    require_sound(engine)


def test_a_tail_among_siblings_that_go_on_with_zeros_is_replaced(engine: Engine) -> None:
    """Token 0 sorts before the seq that ends the tail's own entry, so the tail is not the first of its group."""
    for tokens, fidelity in (([1, 0, 0, 0, 0], 400), ([1], FIDELITY_EXACT), ([1, 7], FIDELITY_EXACT)):
        engine.store(NS.to_record(), [new_block(NS.root, NS.root, 0, pack_tokens(tokens), fidelity)])
    assert sorted(info.row.tokens for info in engine.list_blocks()) == [
        pack_tokens([1, 0, 0, 0, 0]),
        pack_tokens([1, 7]),
    ]


def test_an_index_that_is_full_stops_stores_and_nothing_else(tmp_path: Path) -> None:
    """STORE_FULL, no file left behind, everything stored before still found."""
    with Engine.open(tmp_path / "data", options(map_bytes=300_000)) as engine:
        stored = 0
        while put(engine, NS, [stored] * 300).reason is Reason.OK:
            stored += 1
        assert stored > 3 and "index" in engine.stats().degraded
        assert all(find(engine, NS, [name] * 300).n_tokens == 300 for name in range(stored))
        require_sound(engine)


def test_a_tail_that_a_longer_sibling_covers_is_not_kept(engine: Engine) -> None:
    """It is counted as stored, and costs nothing."""
    put(engine, NS, list(range(100)))
    receipt = put(engine, NS, list(range(60)))
    assert (receipt.blocks, receipt.new_bytes, receipt.reason) == (1, 0, Reason.OK)
    assert len(blob_paths(engine._shared.directory.root)) == 1
    require_sound(engine)


def test_a_block_of_higher_fidelity_replaces_a_lower_one_and_never_the_other_way(engine: Engine) -> None:
    """Same key: the better data stays, under its old children too."""
    tokens = list(range(300))
    put(engine, NS, tokens, fidelity=400)
    assert find(engine, NS, tokens).fidelity == 400
    assert find(engine, NS, tokens, fidelity_min=800).reason is Reason.FIDELITY
    better = put(engine, NS, tokens, fidelity=900)
    assert better.blocks == 2 and better.new_bytes
    worse = put(engine, NS, tokens, fidelity=500)
    assert (worse.blocks, worse.new_bytes) == (2, 0)
    assert find(engine, NS, tokens, fidelity_min=800).n_tokens == 300
    require_sound(engine)


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_longer_block_takes_the_place_of_tails_that_are_no_better(tmp_path: Path, encrypted: bool) -> None:
    """A better one stays for those who take nothing less, unless it is so short that it was to be quantized later."""
    tokens = list(range(400))
    with Engine.open(tmp_path / "data", options(short_tokens=290, master_key=bytes(range(32)))) as engine:
        key = engine.encrypt(NS.root) if encrypted else None
        engine.store(NS.to_record(), sequence(NS, tokens[:280]), encryption=key)
        put(engine, NS, tokens[:300], fidelity=800)
        assert find(engine, NS, tokens, fidelity_min=900).n_tokens == 256
        put(engine, NS, tokens[:310])
        put(engine, NS, tokens[:350], fidelity=800)
        assert find(engine, NS, tokens, fidelity_min=900).n_tokens == 310
        assert find(engine, NS, tokens, fidelity_min=800).n_tokens == 350
        put(engine, NS, tokens[:360], fidelity=400)
        put(engine, NS, tokens[:370], fidelity=400)
        found = {floor: find(engine, NS, tokens, fidelity_min=floor).n_tokens for floor in (900, 800, 400)}
        assert found == {900: 310, 800: 350, 400: 370}
        put(engine, NS, tokens[:380])
        assert find(engine, NS, tokens, fidelity_min=900).n_tokens == 380
        assert engine.stats().blobs == 2
        assert engine.check().findings == []


def test_a_match_skips_what_is_below_the_fidelity_asked_for(engine: Engine) -> None:
    """A shorter exact child wins over a longer lossy one, and the reason says so."""
    engine.store(NS.to_record(), [new_block(NS.root, NS.root, 0, pack_tokens([*range(90), -1]), 400)])
    engine.store(NS.to_record(), [new_block(NS.root, NS.root, 0, pack_tokens([*range(50), -2]), FIDELITY_EXACT)])
    match = find(engine, NS, list(range(200)), fidelity_min=900)
    assert (match.n_tokens, match.reason, match.fidelity) == (50, Reason.FIDELITY, FIDELITY_EXACT)
    assert find(engine, NS, list(range(200))).n_tokens == 90


def test_storing_again_writes_nothing(engine: Engine) -> None:
    """The same sequence a second time: all blocks counted, no bytes."""
    put(engine, NS, list(range(600)))
    before = engine.stats().written_bytes
    receipt = put(engine, NS, list(range(600)))
    assert (receipt.blocks, receipt.new_bytes, receipt.reason) == (3, 0, Reason.OK)
    assert engine.stats().written_bytes == before


def test_a_block_whose_parent_is_not_there_ends_the_store(engine: Engine) -> None:
    """What came before it is kept; a block that does not continue its parent is refused."""
    blocks = sequence(NS, list(range(700)))
    receipt = engine.store(NS.to_record(), [blocks[0], blocks[2]])
    assert (receipt.blocks, receipt.reason) == (1, Reason.DEPENDENCY_LOST)
    assert find(engine, NS, list(range(700))).n_tokens == 256
    wrong = new_block(NS.root, blocks[0].block.key, 512, pack_tokens([1]))
    foreign = new_block(OTHER.root, OTHER.root, 0, pack_tokens([1]))
    put(engine, NS, [1, 2, 3])
    after_tail = new_block(NS.root, sequence(NS, [1, 2, 3])[0].block.key, 3, pack_tokens([4]))
    for bad in (wrong, foreign, after_tail):
        with pytest.raises(InvalidRequestError):
            engine.store(NS.to_record(), [bad])
    require_sound(engine)


def test_an_exception_from_the_iterator_stores_nothing(engine: Engine) -> None:
    """It comes out as it is, and its files are gone, also those of blocks before it."""

    def blocks() -> Iterator[NewBlock]:
        yield from sequence(NS, list(range(512)))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.store(NS.to_record(), blocks())
    assert find(engine, NS, list(range(512))).reason is Reason.IDENTITY
    assert engine.stats().pending_bytes == 0
    require_sound(engine)


def test_blocks_are_pulled_one_at_a_time_and_nobody_waits_for_them(engine: Engine) -> None:
    """While a store hangs in its iterator, others match, store and evict."""
    hanging, go_on = threading.Event(), threading.Event()

    def blocks() -> Iterator[NewBlock]:
        first, second = sequence(NS, list(range(300)))
        yield first
        hanging.set()
        assert go_on.wait(60)
        yield second

    thread = threading.Thread(target=engine.store, args=(NS.to_record(), blocks()))
    thread.start()
    assert hanging.wait(60)
    assert find(engine, NS, [1]).reason is Reason.IDENTITY
    put(engine, OTHER, list(range(10)))
    assert find(engine, OTHER, list(range(10))).n_tokens == 10
    assert engine.evict(Selection(namespace_prefix=OTHER.root)).blocks == 1
    assert engine.check(repair=True).findings == []
    go_on.set()
    thread.join()
    assert find(engine, NS, list(range(300))).n_tokens == 300
    require_sound(engine)


def test_two_stores_of_the_same_blocks_at_once_leave_one_file_each(engine: Engine) -> None:
    """Both write, the later commit finds the rows and drops its own files; both are told that all is stored."""
    barrier = threading.Barrier(2)
    receipts = []

    def blocks() -> Iterator[NewBlock]:
        made = sequence(NS, list(range(600)))
        yield made[0]
        barrier.wait(60)
        yield from made[1:]
        barrier.wait(60)

    def store() -> None:
        receipts.append(engine.store(NS.to_record(), blocks()))

    threads = [threading.Thread(target=store) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(each.blocks, each.reason) for each in receipts] == [(3, Reason.OK)] * 2
    assert sorted(bool(each.new_bytes) for each in receipts) == [False, True]
    require_sound(engine)


def test_a_parent_that_is_evicted_during_a_store_costs_the_rest(engine: Engine) -> None:
    """The commit looks again: rows whose parent has gone meanwhile are not made, and their files are unlinked."""
    made = sequence(NS, list(range(700)))
    engine.store(NS.to_record(), made[:1])

    def blocks() -> Iterator[NewBlock]:
        yield made[1]
        engine.evict(Selection(key_prefix=made[0].block.key))
        yield made[2]

    receipt = engine.store(NS.to_record(), blocks())
    assert (receipt.blocks, receipt.new_bytes, receipt.reason) == (0, 0, Reason.DEPENDENCY_LOST)
    require_sound(engine)


@pytest.mark.parametrize("ahead", [0, 1])
def test_write_order_is_files_then_folder_then_row(tmp_path: Path, ahead: int) -> None:
    """Tmp, fsync and rename of each blob, one folder sync and one commit for the request."""
    fs = RecordingFs()
    with Engine.open(tmp_path / "data", options(durability="full"), fs) as engine:
        fs.calls.clear()
        engine.store(NS.to_record(), sequence(NS, list(range(600))), ahead=ahead)
        calls = [call for call in fs.calls if call[0] != "write"]
    names = [name for name, _ in calls]
    assert names[:2] == ["mkdir", "fsync_dir"]
    # The folder, then the namespace's identity, once, then the commit.
    assert names[-7:] == ["fsync_dir", "unlink", "open", "fsync", "rename", "commit", "flush_drive"]
    *files, identity = [what for name, what in calls if name == "rename"]
    assert identity == "identity.json" and len(files) == 3 and len(calls) == 2 + 3 * 3 + 7
    # While one is synced, the next is written; each keeps its own order.
    for file in files:
        steps = [calls.index(step) for step in (("open", f"{file}.tmp"), ("fsync", f"{file}.tmp"), ("rename", file))]
        assert steps == sorted(steps)


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_bytes_of_a_block_are_read_before_its_buffer_is_used_again(tmp_path: Path, ahead: int) -> None:
    """The caller has one buffer more than it is ahead, and the disk is slower than it."""

    class Slow(RecordingFs):
        """Every write takes a while."""

        def write(self, fd: int, data: memoryview) -> int:
            time.sleep(0.02)
            return super().write(fd, data)

    tokens = list(range(5 * 256 + 10))
    memory = [bytearray(1 << 20) for _ in range(ahead + 1)]

    def blocks() -> Iterator[NewBlock]:
        for number, new in enumerate(sequence(NS, tokens)):
            buffer, free = memory[number % len(memory)], 0
            buffer[:] = bytes(len(buffer))  # whatever still had to be written of it would be zeros
            views = []
            for data in new.buffers:
                raw = bytes(data)
                buffer[free : free + len(raw)] = raw
                views.append(memoryview(buffer)[free : free + len(raw)])
                free += len(raw)
            yield NewBlock(new.block, views)

    with Engine.open(tmp_path / "data", options(), Slow()) as engine:
        receipt = engine.store(NS.to_record(), blocks(), ahead=ahead)
        assert (receipt.blocks, receipt.reason) == (6, Reason.OK)
        assert find(engine, NS, tokens).n_tokens == len(tokens)
        assert engine.check().findings == []


def test_delete_order_is_row_then_file(tmp_path: Path) -> None:
    """No unlink of a blob before a commit, for eviction and for replacement."""
    fs = RecordingFs()
    with Engine.open(tmp_path / "data", options(), fs) as engine:
        put(engine, NS, list(range(300)))
        fs.calls.clear()
        put(engine, NS, list(range(310)))
        names = [name for name, _ in fs.calls]
        assert names.index("commit") < names.index("unlink") and names.count("commit") == 1
        fs.calls.clear()
        engine.evict(Selection(all=True))
        names = [name for name, _ in fs.calls if name in ("commit", "unlink")]
        assert names.index("unlink") > names.index("commit") and "commit" not in names[names.index("unlink") :]


def test_durability_none_syncs_nothing(tmp_path: Path) -> None:
    """Neither files nor folders."""
    fs = RecordingFs()
    with Engine.open(tmp_path / "data", options(durability="none"), fs) as engine:
        put(engine, NS, list(range(300)))
        assert not {"fsync", "fsync_dir", "flush_drive"} & {name for name, _ in fs.calls}
        assert find(engine, NS, list(range(300))).n_tokens == 300
    with Engine.open(tmp_path / "data", options(durability="none")) as engine:
        assert find(engine, NS, list(range(300))).n_tokens == 300


def test_files_are_private_under_any_umask(tmp_path: Path) -> None:
    """0600 and 0700, whether the umask takes everything away or nothing."""
    for number, umask in enumerate((0o000, 0o777)):
        previous = os.umask(umask)
        try:
            with Engine.open(tmp_path / str(number), options()) as engine:
                put(engine, NS, list(range(300)))
        finally:
            os.umask(previous)
        for path in [tmp_path / str(number), *(tmp_path / str(number)).rglob("*")]:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_names_of_blobs_say_what_they_hold(engine: Engine) -> None:
    """Key and number in the name, one folder for one namespace."""
    put(engine, NS, list(range(600)))
    keys = Chain(NS.root, pack_tokens(list(range(600)))).keys()
    paths = blob_paths(engine._shared.directory.root)
    assert {path.parent.name for path in paths} == {NS.root.hex()}
    assert {path.name.split("-")[0] for path in paths} >= {key.hex() for key in keys}


def test_a_second_engine_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    """With pid and socket; after a close, the next one gets it."""
    with Engine.open(tmp_path / "data", options(socket="unix:/s")), pytest.raises(DirectoryHeldError) as caught:
        Engine.open(tmp_path / "data", options())
    assert str(os.getpid()) in str(caught.value) and "unix:/s" in str(caught.value)
    Engine.open(tmp_path / "data", options()).close()


def test_an_index_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    """Nothing is deleted; the older engine simply does not open it."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, list(range(300)))
        with engine._shared.index.edit() as edit:
            edit.set_meta("version", 4)
    files = blob_paths(tmp_path / "data")
    with pytest.raises(UnknownFormatError, match="version 4"):
        Engine.open(tmp_path / "data", options())
    assert blob_paths(tmp_path / "data") == files


def test_list_and_show_tell_about_rows(engine: Engine) -> None:
    """Newest access first; by leading bytes of namespace or key."""
    put(engine, NS, list(range(300)))
    put(engine, OTHER, list(range(10)))
    engine.touch(find(engine, NS, list(range(256))).slices)
    listed = engine.list_blocks()
    assert len(listed) == 3 and len(engine.list_blocks(NS.root[:4])) == 2 and len(engine.list_blocks(limit=1)) == 1
    [one] = engine.show(listed[0].row.key[:6])
    assert one.row == listed[0].row and Path(one.path).exists() and one.accessed_s > 1_700_000_000
    assert engine.show(b"") and engine.show(bytes(32)) == []
    assert isinstance(one.row.block, Block) and one.row.block.namespace == b""
    assert one.row.n_tokens == one.row.block.n_tokens and one.row.described


def test_stats_count_what_is_there(engine: Engine) -> None:
    """Per namespace and in total."""
    put(engine, NS, list(range(300)))
    put(engine, OTHER, list(range(10)))
    stats = engine.stats()
    assert stats.blobs == 3 and stats.degraded == "" and stats.quarantined == 0
    by_alias = {one.info.alias: one for one in stats.namespaces}
    assert (by_alias["weights"].blocks, by_alias["weights"].tokens) == (2, 300)
    assert by_alias["other weights"].logical_bytes == 10 * NS.layout.token_bytes
    assert stats.stored_bytes == sum(one.disk_bytes for one in stats.namespaces)
    assert stats.stored_bytes + stats.index_bytes < stats.used_bytes == disk_usage(engine._shared.directory.root)


def test_the_first_unusable_file_of_a_plan_is_named(engine: Engine) -> None:
    """Gone, or of another size; what its bytes are, the reader verifies."""
    put(engine, NS, list(range(700)))
    slices = find(engine, NS, list(range(700))).slices
    assert engine.first_unusable(slices) is None and engine.first_unusable([]) is None
    os.truncate(blob_path(engine, slices[2].row), 10)
    assert engine.first_unusable(slices) == 2
    blob_path(engine, slices[1].row).unlink()
    assert engine.first_unusable(slices) == 1


def test_a_closed_engine_refuses_and_closes_twice(tmp_path: Path) -> None:
    """With a typed error, not a crash."""
    engine = Engine.open(tmp_path / "data", options())
    put(engine, NS, list(range(10)))
    engine.close()
    engine.close()
    with pytest.raises(DirectoryError):
        engine.match(Chain(NS.root, pack_tokens([1, 2])))


def test_options_that_make_no_sense_are_refused() -> None:
    """An unknown durability, a negative size."""
    for changes in ({"durability": "maybe"}, {"budget_bytes": -1}, {"free_floor_bytes": -1}):
        with pytest.raises(ConfigError):
            options(**changes)


def test_a_damaged_row_is_corrupt_and_not_an_accident(engine: Engine) -> None:
    """Whatever bytes a row has, looking into it is CorruptDataError or works."""
    put(engine, NS, list(range(10)))
    [info] = engine.list_blocks()
    for cut in (0, 50, 119, 130, len(info.row.value) - 1):
        with engine._shared.index.edit() as edit:
            edit._txn.put(info.row.key, info.row.value[:cut], db=edit._db["rows"])
        with pytest.raises(CorruptDataError):
            [part.row.block for part in engine.match(Chain(NS.root, pack_tokens(range(10)))).slices]


def test_many_threads_store_match_and_evict(tmp_path: Path) -> None:
    """No error and no wrong byte with a small budget and everybody at once; sound afterwards."""
    with Engine.open(tmp_path / "data", options(budget_bytes=600_000)) as engine:

        def work(number: int) -> None:
            for turn in range(12):
                tokens = [number % 2, *range(200 + 90 * (turn % 6))]
                receipt = put(engine, NS, tokens)
                assert receipt.reason in (Reason.OK, Reason.DEPENDENCY_LOST, Reason.STORE_FULL)
                packed = pack_tokens(tokens)
                match = engine.match(Chain(NS.root, packed))
                with engine.lease(part.row for part in match.slices):
                    engine.touch(match.slices)
                    # Gone meanwhile is a shorter prefix; other bytes than those of the tokens are an error.
                    with contextlib.suppress(CorruptDataError):
                        require_right(engine, match, packed)
                if turn % 5 == 4:
                    engine.evict(Selection(bytes=1))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        assert engine.used_bytes <= 600_000
        require_sound(engine)


def test_children_that_share_everything_but_the_end_are_told_apart(engine: Engine) -> None:
    """Hundreds of tails equal beyond their code: the best one is found among them."""
    base = list(range(180))
    for number in range(120):
        engine.store(NS.to_record(), [new_block(NS.root, NS.root, 0, pack_tokens([*base, number, number]))])
    for number in itertools.chain(range(0, 120, 13), [119]):
        assert find(engine, NS, [*base, number, number, 5]).n_tokens == 182
        assert find(engine, NS, [*base, number, -5]).n_tokens == 181
    assert find(engine, NS, [*base, 500]).n_tokens == 180


def test_a_blob_is_written_while_the_next_one_is_made() -> None:
    """Whether or not blobs are synced: a store without syncs overlaps as any other."""
    may_go = threading.Event()
    blobs = mock.Mock(put=lambda *_: may_go.wait(10) and mock.Mock())
    with contextlib.closing(WriteBehind(blobs, ahead=1)) as behind:
        begun = behind.put(BlobId(b"", b"", 1), [], lambda: None)
        assert not begun.written.done()
        may_go.set()
    assert begun.synced.done() and begun.synced.exception() is None
