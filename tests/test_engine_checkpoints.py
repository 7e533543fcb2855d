"""Checkpoints in the engine: stored at exact positions, found with the blocks that cover them, evicted before them."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash

from kvstore.core.blocks import FIDELITY_EXACT, Reason, pack_tokens
from kvstore.core.keys import Chain, Namespace
from kvstore.engine import Engine, Match, NewBlock, Selection, Slice, check_directory
from kvstore.errors import CorruptDataError, InvalidRequestError
from kvstore.index.rows import CHECK_BYTES, Row, checkpoint_prefix, parse_row
from tests.support.engine import (
    HYBRID,
    RECURRENT,
    RecordingFs,
    Stopped,
    StoppingFs,
    blob_path,
    checkpoint,
    drop_children,
    find,
    namespace,
    new_block,
    options,
    put,
    put_checkpoint,
    require_sound,
    sequence,
)

NS = namespace("hybrid", HYBRID)
BARE = namespace("recurrent", RECURRENT)
LONG = list(range(600))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """An engine with room for everything."""
    with Engine.open(tmp_path / "data", options()) as opened:
        yield opened


def exact(engine: Engine, tokens: list[int], ns: Namespace = NS, **details: int) -> Match:
    """A verified match that ends at a checkpoint."""
    return find(engine, ns, tokens, exact=True, **details)


def with_checkpoints(ns: Namespace, tokens: list[int], ends: list[int]) -> list[NewBlock]:
    """One request: blocks and tail, then the checkpoints."""
    return [*sequence(ns, tokens), *(checkpoint(ns, tokens[:end]) for end in ends)]


def checkpoints(engine: Engine) -> list[Row]:
    """All that are held."""
    return [info.row for info in engine.list_blocks() if info.row.is_checkpoint]


@pytest.mark.parametrize("ns", [NS, BARE])
@pytest.mark.parametrize("ends", [(1, 300, 600), (100, 256, 512)])
def test_a_checkpoint_is_found_at_and_after_its_position_and_after_a_restart(
    tmp_path: Path, ns: Namespace, ends: tuple[int, ...]
) -> None:
    """At a block's end and between, in the first block and later; also where no layer has KV."""
    with Engine.open(tmp_path / "data", options()) as engine:
        receipt = engine.store(ns.to_record(), with_checkpoints(ns, LONG, ends))
        assert (receipt.blocks, receipt.reason) == (6, Reason.OK)
    with Engine.open(tmp_path / "data", options()) as engine:
        for asked in (1, 2, 99, 100, 101, 255, 256, 257, 299, 300, 511, 512, 513, 599, 600, 601):
            match = exact(engine, list(range(asked)), ns)
            best = max((end for end in ends if end <= asked), default=0)
            assert match.n_tokens == best and (match.checkpoint is not None) == (best > 0)
            assert sum(part.take for part in match.slices) == best
            usual = Reason.OK if asked == best else Reason.UNKNOWN_PREFIX
            assert match.reason is (Reason.NO_CHECKPOINT if best < min(asked, 600) else usual)
            held = engine.checkpoint_at(Chain(ns.root, pack_tokens(range(asked))))
            assert (held == match.checkpoint) if asked == best else held is None
        require_sound(engine)


def test_without_a_checkpoint_an_exact_match_is_a_miss(engine: Engine) -> None:
    """Named so if there are blocks; as any other miss if there are none."""
    assert exact(engine, LONG).reason is Reason.IDENTITY
    put(engine, NS, LONG)
    match = exact(engine, LONG)
    assert (match.n_tokens, match.slices, match.checkpoint, match.diverged) == (0, (), None, False)
    assert match.reason is Reason.NO_CHECKPOINT
    assert exact(engine, [-1, *LONG]).reason is Reason.UNKNOWN_PREFIX
    assert find(engine, NS, LONG).n_tokens == 600
    engine.evict(Selection(all=True))
    assert exact(engine, LONG).reason is Reason.EVICTED


def test_the_limit_holds_for_checkpoints_too(engine: Engine) -> None:
    """A fetch leaves the last token to the engine, whose checkpoint is then too far."""
    engine.store(NS.to_record(), with_checkpoints(NS, LONG, [400, 599, 600]))
    assert exact(engine, LONG, limit_tokens=599).n_tokens == 599
    assert exact(engine, LONG, limit_tokens=598).n_tokens == 400
    assert exact(engine, LONG, limit_tokens=0).n_tokens == 0


def test_a_checkpoint_that_blocks_do_not_cover_is_not_used(engine: Engine) -> None:
    """Its tail is missing: the next lower one, until the tail is there."""
    engine.store(NS.to_record(), with_checkpoints(NS, LONG[:256], [200]))
    put_checkpoint(engine, NS, LONG[:300])
    assert exact(engine, LONG).n_tokens == 200
    put(engine, NS, LONG[:299])
    assert exact(engine, LONG).n_tokens == 200
    put(engine, NS, LONG[:301])
    assert exact(engine, LONG).n_tokens == 300


def test_a_match_says_when_what_is_stored_goes_on_elsewhere(engine: Engine) -> None:
    """After the checkpoint, in the same block or in the next; not at the end of what is stored or asked for."""
    engine.store(NS.to_record(), with_checkpoints(NS, LONG[:500], [100, 256]))
    assert exact(engine, [*LONG[:100], -1]).diverged
    assert exact(engine, [*LONG[:150], -1]).diverged
    assert exact(engine, [*LONG[:256], -1]).diverged
    assert not exact(engine, LONG[:256]).diverged
    other = namespace("other", HYBRID)
    engine.store(other.to_record(), with_checkpoints(other, LONG[:256], [100, 256]))
    assert not exact(engine, [*LONG[:256], -1], other).diverged
    engine.store(other.to_record(), with_checkpoints(other, LONG[:300], [300]))
    assert not exact(engine, [*LONG[:300], -1], other).diverged
    assert exact(engine, [*LONG[:256], -1], other).diverged


def test_a_checkpoint_below_the_fidelity_asked_for_is_passed_over(engine: Engine) -> None:
    """What it was computed on counts, not that its own bytes are exact."""
    put(engine, NS, LONG)
    put_checkpoint(engine, NS, LONG[:500], fidelity=850)
    put_checkpoint(engine, NS, LONG[:300])
    match = exact(engine, LONG)
    assert (match.n_tokens, match.fidelity) == (500, 850)
    match = exact(engine, LONG, fidelity_min=900)
    assert (match.n_tokens, match.fidelity, match.reason) == (300, FIDELITY_EXACT, Reason.FIDELITY)


def test_the_better_checkpoint_of_a_position_stays(engine: Engine) -> None:
    """A higher fidelity replaces, an equal or lower one costs nothing; a mark survives the change."""
    put(engine, NS, LONG)
    for fidelity, written in ((400, True), (400, False), (900, True), (500, False)):
        receipt = put_checkpoint(engine, NS, LONG[:300], fidelity=fidelity)
        assert (receipt.blocks, bool(receipt.new_bytes)) == (1, written)
        [row] = checkpoints(engine)
        engine.mark_divergence(row)
    assert row.fidelity == 900
    put_checkpoint(engine, NS, LONG[:300])
    assert engine._shared.index.table.value(row.key, "mark") > 0
    require_sound(engine)


def test_tails_and_checkpoints_leave_each_other_alone(engine: Engine) -> None:
    """Same tokens, same parent: neither replaces, covers or shortens the other."""
    for end in (50, 100, 200, 256, 300):
        put_checkpoint(engine, NS, LONG[: min(end, 255)])
        put(engine, NS, LONG[:end])
    assert [row.end for row in sorted(checkpoints(engine), key=lambda row: row.end)] == [50, 100, 200, 255]
    assert sorted(info.row.n_tokens for info in engine.list_blocks() if not info.row.is_checkpoint) == [44, 256]
    assert find(engine, NS, LONG[:300]).n_tokens == 300
    assert find(engine, NS, [-1]).n_tokens == 0
    require_sound(engine)


def test_a_plain_match_never_meets_a_checkpoint(engine: Engine) -> None:
    """Not even where it is all that its parent has, whatever the query begins with."""
    put(engine, NS, LONG[:256])
    for end in (1, 20, 200, 256):
        put_checkpoint(engine, NS, LONG[:end])
    for first in (0, 1, (1 << 23) - 1, 1 << 23, -1, -(1 << 63), (1 << 63) - 1):
        match = find(engine, NS, [*LONG[:256], first])
        assert match.n_tokens == 256 and match.checkpoint is None
        assert all(not part.row.is_checkpoint for part in match.slices)


def test_a_checkpoint_needs_its_block_and_nothing_follows_it(engine: Engine) -> None:
    """The parent in the index, earlier in the request, or the root; a block after a checkpoint is refused."""
    assert put_checkpoint(engine, NS, LONG[:300]).reason is Reason.DEPENDENCY_LOST
    assert put_checkpoint(engine, NS, LONG[:200]).reason is Reason.OK
    assert engine.store(NS.to_record(), with_checkpoints(NS, LONG, [600])).blocks == 4
    at_end = checkpoint(NS, LONG[:512])
    engine.store(NS.to_record(), [at_end])
    after = new_block(NS.root, at_end.block.key, 512, pack_tokens([1]), layout=HYBRID)
    with pytest.raises(InvalidRequestError):
        engine.store(NS.to_record(), [after])
    wrong = checkpoint(NS, LONG[:300])
    with pytest.raises(InvalidRequestError):
        engine.store(NS.to_record(), [replace(wrong, block=replace(wrong.block, start=512))])
    with pytest.raises(InvalidRequestError):
        engine.store(NS.to_record(), [replace(wrong, buffers=wrong.buffers[:-1])])
    require_sound(engine)


def test_checkpoints_go_before_what_covers_them(tmp_path: Path) -> None:
    """One leaf at a time, under one stamp and after use: no checkpoint is ever left without its blocks."""
    for used in (None, 300, 512):
        with Engine.open(tmp_path / str(used), options()) as engine:
            engine.store(NS.to_record(), with_checkpoints(NS, [*LONG, *LONG], [100, 256, 300, 512, 700, 1100, 1200]))
            if used:
                engine.touch(exact(engine, LONG[:used]).parts)
            while engine.list_blocks():
                for row in checkpoints(engine):
                    assert exact(engine, [*LONG, *LONG], limit_tokens=row.end).n_tokens == row.end
                assert engine.evict(Selection(bytes=1)).blocks == 1
            require_sound(engine)


def test_use_keeps_a_checkpoint(engine: Engine) -> None:
    """Everything of a match is touched at once; of two conversations the one that is not used goes whole."""
    one, two = LONG, [-1, *LONG]
    for tokens in (one, two):
        engine.store(NS.to_record(), with_checkpoints(NS, tokens, [len(tokens)]))
    engine.touch(exact(engine, one).parts)
    engine.evict(Selection(bytes=1))
    assert exact(engine, one).n_tokens == 600 and exact(engine, two).n_tokens == 0
    assert [part.row.end for part in exact(engine, one).parts] == [256, 512, 600, 600]


def test_a_leased_checkpoint_keeps_its_file(engine: Engine) -> None:
    """Until it is open, like a block's."""
    engine.store(NS.to_record(), with_checkpoints(NS, LONG, [500]))
    [row] = checkpoints(engine)
    assert engine.first_unusable([Slice(row, row.n_tokens)]) is None
    with engine.lease([row]):
        engine.evict(Selection(key_prefix=row.key))
        assert blob_path(engine, row).exists() and exact(engine, LONG).n_tokens == 0
    assert not blob_path(engine, row).exists()
    assert engine.first_unusable([Slice(row, row.n_tokens)]) == 0
    require_sound(engine)


def broken(tokens: list[int]) -> NewBlock:
    """A checkpoint whose first layer has an array of another shape than the layout says; its checksums are right."""
    made = checkpoint(NS, tokens)
    first, *others = made.block.states
    array = replace(first.arrays[0], shape=(1, 2, 3))
    states = (replace(first, arrays=(array, *first.arrays[1:])), *others)
    return NewBlock(replace(made.block, states=states), made.buffers)


def stored_broken(path: Path) -> Path:
    """A directory with a sound checkpoint and then a broken one, as no daemon writes it; the latter's file."""
    with Engine.open(path / "data", options()) as engine:
        engine.store(NS.to_record(), [*with_checkpoints(NS, LONG, [300]), broken(LONG)])
        [file] = [blob_path(engine, row) for row in checkpoints(engine) if row.end == 600]
        return file


@pytest.mark.parametrize("how", ["report", "check", "offline", "rebuild", "scrub"])
def test_a_checkpoint_that_breaks_a_rule_goes_to_quarantine(tmp_path: Path, how: str) -> None:
    """Though every checksum is right: by a report, a check, a rebuild of the index, the scrub."""
    file = stored_broken(tmp_path)
    if how == "offline":
        found = [one.kind for one in check_directory(tmp_path / "data", repair=True).findings]
        assert found == ["corrupt_blob"]
    if how == "rebuild":
        shutil.rmtree(tmp_path / "data" / "index")
    scrub = {"scrub_bytes_per_s": 1 << 30, "scrub_interval_s": 0.0} if how == "scrub" else {}
    with Engine.open(tmp_path / "data", options(**scrub)) as engine:
        row = next((row for row in checkpoints(engine) if row.end == 600), None)
        if how == "report":
            assert row is not None and engine.first_unusable([Slice(row, row.n_tokens)]) == 0
            assert engine.recheck(row.key)
        if how == "check":
            assert [one.kind for one in engine.check(repair=True).findings] == ["corrupt_blob"]
        if how == "scrub":
            time.sleep(0.01)
            engine.scrub()
        assert not file.exists() and engine.stats().quarantined == 1
        assert exact(engine, LONG).n_tokens == 300
        require_sound(engine)


def test_stats_tell_checkpoints_from_blocks(engine: Engine) -> None:
    """In total and for each namespace; tokens are counted once."""
    engine.store(NS.to_record(), with_checkpoints(NS, LONG, [256, 500]))
    put(engine, BARE, LONG[:10])
    stats = engine.stats()
    assert (stats.blobs, stats.checkpoints, stats.checkpoint_bytes) == (6, 2, 2 * 4096)
    use = {one.info.alias: one for one in stats.namespaces}
    assert (use["hybrid"].blocks, use["hybrid"].tokens, use["hybrid"].checkpoints) == (3, 600, 2)
    assert (use["hybrid"].checkpoint_bytes, use["recurrent"].checkpoints) == (8192, 0)
    assert stats.stored_bytes == sum(one.disk_bytes for one in stats.namespaces)
    [shown] = engine.show(checkpoints(engine)[0].key[:8])
    assert shown.row.is_checkpoint and Path(shown.path).exists() and shown.row.block.states
    assert engine.evict(Selection(namespace_prefix=NS.root)).blocks == 5
    stats = engine.stats()
    assert (stats.checkpoints, stats.checkpoint_bytes) == (0, 0)


def test_a_damaged_checkpoint_is_quarantined_alone(engine: Engine) -> None:
    """The blocks stay, and the next lower one is found; damage to a block takes what depends on it along."""
    engine.store(NS.to_record(), with_checkpoints(NS, LONG, [300, 550]))
    row = exact(engine, LONG).checkpoint
    assert row is not None
    data = bytearray(blob_path(engine, row).read_bytes())
    data[-1] ^= 1
    blob_path(engine, row).write_bytes(data)
    assert [finding.kind for finding in engine.check().findings] == ["corrupt_blob"]
    assert engine.recheck(row.key) and engine.stats().quarantined == 1
    assert find(engine, NS, LONG).n_tokens == 600 and exact(engine, LONG).n_tokens == 300
    first = find(engine, NS, LONG).slices[0].row
    blob_path(engine, first).write_bytes(b"")
    assert engine.recheck(first.key)
    assert engine.list_blocks() == [] and engine.stats().checkpoint_bytes == 0
    require_sound(engine)


def test_a_rebuild_brings_checkpoints_back(tmp_path: Path) -> None:
    """From their own headers; not those whose block is gone."""
    with Engine.open(tmp_path / "data", options()) as engine:
        engine.store(NS.to_record(), with_checkpoints(NS, LONG, [100, 256, 550]))
        engine.store(BARE.to_record(), with_checkpoints(BARE, LONG, [300]))
        before = {info.row.key: info.row.value for info in engine.list_blocks()}
        lost = find(engine, NS, LONG).slices[1].row
    shutil.rmtree(tmp_path / "data" / "index")
    with Engine.open(tmp_path / "data", options()) as engine:
        assert {info.row.key: info.row.value for info in engine.list_blocks()} == before
        assert exact(engine, LONG).n_tokens == 550 and exact(engine, LONG, BARE).n_tokens == 300
        require_sound(engine)
        blob_path(engine, lost).unlink()
    shutil.rmtree(tmp_path / "data" / "index")
    assert check_directory(tmp_path / "data", repair=True).repaired
    with Engine.open(tmp_path / "data", options()) as engine:
        assert exact(engine, LONG).n_tokens == 256 and len(checkpoints(engine)) == 3
        require_sound(engine)


def test_marks_and_order_survive_a_reindex_and_a_restart(tmp_path: Path) -> None:
    """Written with the next commit or the close; entries of children that are lost are found and mended."""
    with Engine.open(tmp_path / "data", options()) as engine:
        engine.store(NS.to_record(), with_checkpoints(NS, LONG, [100, 550]))
        marked = engine.checkpoint_at(Chain(NS.root, pack_tokens(LONG[:100])))
        assert marked is not None
        engine.mark_divergence(marked)
        engine.mark_divergence(find(engine, NS, LONG).slices[0].row)
    with Engine.open(tmp_path / "data", options()) as engine:
        drop_children(engine)
        assert {finding.kind for finding in engine.check(repair=True).findings} == {"row"}
        table = engine._shared.index.table
        with engine._shared.index.view() as view:
            assert [row.key for row in view.rows() if table.value(row.key, "mark")] == [marked.key]
        require_sound(engine)


def test_many_marks_are_written_before_they_are_many(tmp_path: Path) -> None:
    """Bounded in memory like notes of use."""
    fs = RecordingFs()
    with Engine.open(tmp_path / "data", options(touches_max=3), fs) as engine:
        engine.store(NS.to_record(), with_checkpoints(NS, LONG, [100, 200, 300]))
        fs.calls.clear()
        for row in checkpoints(engine):
            engine.mark_divergence(row)
        assert fs.calls == []
        engine.maintain()
        assert [name for name, _ in fs.calls] == ["commit"]


def test_retention_is_part_of_the_one_commit(tmp_path: Path) -> None:
    """The row of what goes is deleted with the commit that adds, and its file unlinked after it."""
    fs = RecordingFs()
    with Engine.open(tmp_path / "data", options(), fs) as engine:
        engine.store(NS.to_record(), with_checkpoints(NS, LONG, [300, 320, 340]))
        fs.calls.clear()
        put_checkpoint(engine, NS, LONG[:400])
        assert [name for name, _ in fs.calls if name != "write"][-2:] == ["commit", "unlink"]
        assert sorted(row.end for row in checkpoints(engine)) == [300, 340, 400]
        require_sound(engine)


def test_a_stop_at_any_call_loses_no_checkpoint_that_was_to_stay(tmp_path: Path) -> None:
    """While retention is at work; every second call, since the others are covered by the blocks' own test."""
    for at in itertools.count(0, 2):
        data_dir, snapshot = tmp_path / f"d{at}", tmp_path / f"s{at}"
        with Engine.open(data_dir, options()) as engine:
            engine.store(NS.to_record(), with_checkpoints(NS, LONG, [300, 350, 400]))
        engine = Engine.open(data_dir, options(), StoppingFs(at, data_dir, snapshot))
        try:
            engine.store(NS.to_record(), [checkpoint(NS, LONG[:500])])
            engine.close()
            break
        except Stopped:
            pass
        with Engine.open(snapshot, options()) as engine:
            require_sound(engine)
            assert {300, 400} <= {row.end for row in checkpoints(engine)}
            put_checkpoint(engine, NS, LONG[:500])
            assert [row.end for row in sorted(checkpoints(engine), key=lambda row: row.end)] == [300, 400, 500]
    assert at > 8


def rechecked(row: Row, value: bytes) -> Row:
    """A row with another value, whose checksum is right."""
    check = xxhash.xxh3_64_intdigest(value, int.from_bytes(row.key[:8], "little"))
    return parse_row(row.key, value + check.to_bytes(CHECK_BYTES, "little"), row.templates)


def test_a_damaged_row_of_a_checkpoint_is_corrupt_and_not_an_accident(engine: Engine) -> None:
    """Another kind, no states, states where runs should be: CorruptDataError."""
    engine.store(NS.to_record(), with_checkpoints(NS, LONG[:100], [50]))
    [row] = checkpoints(engine)
    block = find(engine, NS, LONG[:100]).slices[0].row
    for whole, kind in ((row, 0), (block, 1), (row, 2), (row, 255)):
        with pytest.raises(CorruptDataError):
            _ = rechecked(whole, whole.value[:2] + bytes([kind]) + whole.value[3:-CHECK_BYTES]).block
    assert rechecked(row, row.value[:-CHECK_BYTES]).block.states == row.block.states
    with pytest.raises(CorruptDataError):
        _ = rechecked(row, row.value[: -CHECK_BYTES - len(row.described)] + b"\x90").block


def test_however_many_siblings_a_checkpoint_has_it_is_found(tmp_path: Path) -> None:
    """Prompts of one length by the hundred after the same block: one lookup, not a scan."""
    with Engine.open(tmp_path / "data", options(durability="none")) as engine:
        for first in range(300):
            engine.store(NS.to_record(), with_checkpoints(NS, [first, *range(40)], [41]))
        for first in (0, 150, 299):
            assert exact(engine, [first, *range(60)]).n_tokens == 41
        assert exact(engine, [300, *range(60)]).n_tokens == 0
        with engine._shared.index.view() as view:
            looked, real = list[bytes](), view.row
            view.row = lambda key: (looked.append(key), real(key))[1]  # type: ignore[method-assign]
            assert [row.n_tokens for row in view.checkpoints(NS.root, pack_tokens([150, *range(60)]))] == [41]
            assert len(looked) == 1
            assert len(list(view.entries(checkpoint_prefix(NS.root, 41)))) == 300
