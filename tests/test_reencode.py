"""Re-encoding in the engine: which blocks are chosen, and one blob in the place of another at every point of a stop."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvstore.core.blocks import FIDELITY_EXACT, Origin, Reason, pack_tokens
from kvstore.core.keys import Chain
from kvstore.engine import Engine, NewBlock, Row, Selection
from kvstore.engine.reencode import coldest
from kvstore.errors import InvalidRequestError
from kvstore.index.table import AUTO, CHECKPOINT, PINNED, SETTLED, Table
from tests.support.engine import (
    HYBRID,
    RecordingFs,
    Stopped,
    StoppingFs,
    blob_path,
    blob_paths,
    chosen_by_auto,
    find,
    namespace,
    new_block,
    options,
    put_checkpoint,
    require_sound,
    sequence,
)

NS = namespace()
TOKENS, TWO_BLOCKS = list(range(600)), list(range(300))
LOW = 400


def put_auto(engine: Engine, tokens: Sequence[int]) -> None:
    """Store a sequence as `auto` does."""
    blocks = [chosen_by_auto(new) for new in sequence(NS, tokens)]
    assert engine.store(NS.to_record(), blocks).reason is Reason.OK


def lower(row: Row) -> NewBlock:
    """A block of the same values, of a lower rank."""
    return new_block(row.root, row.parent, row.start, row.tokens, LOW)


def due(engine: Engine) -> list[bytes]:
    """Keys of all that could be re-encoded now."""
    return [row.key for row in engine.reencoder.coldest([NS.root], 100)]


def keys(tokens: Sequence[int]) -> list[bytes]:
    """Keys of the blocks of a sequence."""
    return list(Chain(NS.root, pack_tokens(tokens)).block_keys())


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """A store with room."""
    return Engine.open(tmp_path / "data", options())


# -- what is chosen --------------------------------------------------------------------------------------------------


def table_of(*rows: tuple[str, str, int]) -> Table:
    """Rows of (name, parent's name, flags), each used later than the one before."""
    table, depths = Table(), {"": -1}
    for name, parent, flags in rows:
        depths[name] = depths[parent] + 1
        above = parent.encode() * 32 if parent else None
        table.add(name.encode() * 32, above, 0, depth=depths[name], nbytes=10, n_tokens=256, flags=flags)
    return table


def chosen(table: Table, leased: str = "") -> str:
    """The names of what is chosen, in order."""
    return "".join(chr(key[0]) for key in coldest(table, [0], [name.encode() * 32 for name in leased], 100))


def test_the_coldest_leaves_that_auto_stored_come_first_and_parents_when_their_children_are_done() -> None:
    """A child that was re-encoded, or cannot be, is no obstacle; nor is a checkpoint."""
    table = table_of(
        ("a", "", AUTO), ("b", "a", AUTO), ("c", "", AUTO), ("d", "c", AUTO | SETTLED), ("e", "c", CHECKPOINT)
    )
    assert chosen(table) == "bc"
    table.settle(b"b" * 32, 0.01)
    assert chosen(table) == "ac"
    table.touch([b"a" * 32], 1)
    assert chosen(table) == "ca"


def test_blocks_of_one_use_go_from_the_deepest_on() -> None:
    """As in an eviction: the beginning of a prompt is worth the most."""
    table = table_of(("a", "", AUTO), ("b", "", AUTO), ("c", "b", AUTO))
    table.touch([b"a" * 32, b"c" * 32], 1)
    assert chosen(table) == "ca"


@pytest.mark.parametrize("flags", [0, AUTO | SETTLED, AUTO | PINNED, AUTO | CHECKPOINT])
def test_what_a_named_profile_stored_is_settled_pinned_or_exact_is_never_chosen(flags: int) -> None:
    """And of the first and the third not what leads to them either."""
    table = table_of(("a", "", AUTO), ("b", "a", flags))
    assert chosen(table) == ("a" if flags & (SETTLED | CHECKPOINT) else "")


def test_what_is_being_read_waits_with_all_that_leads_to_it() -> None:
    """A lease is enough."""
    table = table_of(("a", "", AUTO), ("b", "a", AUTO | SETTLED), ("c", "", AUTO))
    assert chosen(table, leased="b") == "c"


# -- one blob in the place of another --------------------------------------------------------------------------------


def test_a_row_gets_the_new_blob_and_the_lower_rank_at_once_and_never_again(engine: Engine) -> None:
    """The old file is gone, what is told of it is right, and the order of use is as it was."""
    put_auto(engine, TOKENS)
    (leaf,) = engine.reencoder.coldest([NS.root], 1)
    used = engine._shared.index.table.value(leaf.key, "last_use")
    assert engine.reencoder.reencode(leaf, lower(leaf), 0.25)
    match = find(engine, NS, TOKENS)
    assert (match.n_tokens, match.fidelity) == (600, LOW)
    assert not blob_path(engine, leaf).exists()
    assert leaf.key not in due(engine) and engine._shared.index.table.value(leaf.key, "last_use") == used
    found = engine.reencoder.stats()
    assert (found.blocks, found.held_blocks, found.error_mean, found.error_max) == (1, 1, 0.25, 0.25)
    assert found.before_bytes == engine._shared.site.cost(leaf)
    require_sound(engine)
    # A session that asks for more gets what comes before it, and the next leaf is its parent.
    better = engine.match(Chain(NS.root, pack_tokens(TOKENS)), fidelity_min=FIDELITY_EXACT)
    assert (better.n_tokens, better.reason) == (512, Reason.FIDELITY)
    assert due(engine) == [keys(TOKENS)[1]]
    engine.close()


def test_what_was_re_encoded_stays_so_over_a_restart_and_a_rebuild_of_the_index(tmp_path: Path) -> None:
    """And what `auto` stored: both are in the table, and in the headers of the blobs."""
    with Engine.open(tmp_path, options()) as engine:
        put_auto(engine, TOKENS)
        (leaf,) = engine.reencoder.coldest([NS.root], 1)
        assert engine.reencoder.reencode(leaf, lower(leaf), 0.25)
    with Engine.open(tmp_path, options()) as engine:
        assert due(engine) == [keys(TOKENS)[1]]
        assert engine.reencoder.stats().error_max == 0.25
    (tmp_path / "index" / "data.mdb").unlink()
    with Engine.open(tmp_path, options()) as engine:
        assert find(engine, NS, TOKENS).fidelity == LOW
        assert due(engine) == [keys(TOKENS)[1]]
        found = engine.reencoder.stats()
        assert (found.held_blocks, found.error_max) == (1, 0.25)
        require_sound(engine)


@pytest.mark.parametrize("new", [{}, {"auto": True}, {"auto": True, "settled": True}, {"settled": True}])
def test_a_rebuilt_index_has_the_flags_that_blocks_were_stored_with(tmp_path: Path, new: dict[str, Any]) -> None:
    """Nothing of a named profile is taken for what `auto` stored, nor what may not be re-encoded for what may."""
    with Engine.open(tmp_path, options()) as engine:
        origin = Origin(**new) if new else None
        blocks = [replace(one, block=replace(one.block, origin=origin)) for one in sequence(NS, TOKENS)]
        engine.store(NS.to_record(), blocks)
        table = engine._shared.index.table
        stored = {key: table.value(key, "flags") for key in keys(TOKENS)}
        is_due = bool(due(engine))
    assert is_due == (new == {"auto": True})
    (tmp_path / "index" / "data.mdb").unlink()
    with Engine.open(tmp_path, options()) as engine:
        table = engine._shared.index.table
        assert {key: table.value(key, "flags") for key in keys(TOKENS)} == stored
        assert bool(due(engine)) == is_due and engine.reencoder.stats().held_blocks == 0


def test_a_block_that_was_replaced_pinned_claimed_evicted_or_leased_meanwhile_stays(engine: Engine) -> None:
    """The engine looks again in the commit."""
    shared, changes = engine._shared, 0

    def pin(row: Row) -> None:
        engine.keeper.pin(NS.root, [row.key])

    def better(row: Row) -> None:
        shared.index.table.settle(row.key)

    def claim(row: Row) -> None:
        engine.reencoder.claim([row.key])

    def lease(row: Row) -> None:
        engine.lease([row])

    def evict(row: Row) -> None:
        engine.evict(Selection(key_prefix=row.key))

    for change in (pin, better, claim, lease, evict):
        changes += 1000
        tokens = [changes, *TOKENS]
        put_auto(engine, tokens)
        row = find(engine, NS, tokens).slices[-1].row
        change(row)
        assert not engine.reencoder.reencode(row, lower(row), 0.25), change
        assert find(engine, NS, tokens).n_tokens == (512 if change is evict else 601)
    assert engine.reencoder.stats().blocks == 0
    assert engine.check().findings == []
    assert len(blob_paths(shared.directory.root)) == len(shared.index.table)
    engine.close()


def test_a_reader_of_the_old_blob_keeps_it_until_it_lets_go(engine: Engine) -> None:
    """One that has its lease after the commit's look; the file goes when it ends."""
    put_auto(engine, TOKENS)
    (leaf,) = engine.reencoder.coldest([NS.root], 1)
    begin = engine._shared.deletions.begin
    leases = []

    def leased_at_last(costs: object) -> object:
        leases.append(engine.lease([leaf]))
        return begin(costs)  # type: ignore[arg-type]

    engine._shared.deletions.begin = leased_at_last  # type: ignore[assignment, method-assign]
    assert engine.reencoder.reencode(leaf, lower(leaf), 0.25)
    assert blob_path(engine, leaf).exists()
    leases[0].release()
    engine.maintain()
    assert not blob_path(engine, leaf).exists()
    require_sound(engine)
    engine.close()


def test_a_rank_is_never_raised_by_it(engine: Engine) -> None:
    """Nor kept: what would lose nothing is no re-encoding."""
    put_auto(engine, TOKENS)
    (leaf,) = engine.reencoder.coldest([NS.root], 1)
    with pytest.raises(InvalidRequestError):
        engine.reencoder.reencode(leaf, new_block(leaf.root, leaf.parent, leaf.start, leaf.tokens), 0.0)
    engine.close()


def test_a_named_store_in_the_place_of_what_auto_stored_makes_it_its_own(engine: Engine) -> None:
    """Also in the place of what was re-encoded: from then on it stays."""
    put_auto(engine, TOKENS)
    (leaf,) = engine.reencoder.coldest([NS.root], 1)
    assert engine.reencoder.reencode(leaf, lower(leaf), 0.25)
    assert engine.store(NS.to_record(), sequence(NS, TOKENS)).reason is Reason.OK
    assert find(engine, NS, TOKENS).fidelity == FIDELITY_EXACT
    assert due(engine) == [] and engine.reencoder.stats().held_blocks == 0
    engine.close()


def test_what_is_left_alone_is_noted_and_not_tried_again(engine: Engine) -> None:
    """Its parent is next."""
    put_auto(engine, TOKENS)
    (leaf,) = engine.reencoder.coldest([NS.root], 1)
    engine.reencoder.leave(leaf, "it cannot be read")
    assert due(engine) == [keys(TOKENS)[1]]
    assert engine.reencoder.stats().left_blocks == 1
    engine.close()


def test_a_hybrid_whose_blocks_were_re_encoded_still_ends_at_its_checkpoint(tmp_path: Path) -> None:
    """At the rank of its blocks: the checkpoint itself is exact."""
    mixed = namespace("mixed", HYBRID)
    with Engine.open(tmp_path, options()) as engine:
        blocks = [chosen_by_auto(new) for new in sequence(mixed, TOKENS)]
        engine.store(mixed.to_record(), blocks)
        put_checkpoint(engine, mixed, TOKENS)
        rows = engine.reencoder.coldest([mixed.root], 100)
        assert [row.start for row in rows] == [512]
        new = new_block(rows[0].root, rows[0].parent, rows[0].start, rows[0].tokens, LOW, HYBRID)
        assert engine.reencoder.reencode(rows[0], new, 0.1)
        match = find(engine, mixed, TOKENS, exact=True)
        assert (match.n_tokens, match.fidelity) == (600, LOW)


def work(engine: Engine) -> None:
    """All of a sequence, from its end to its beginning."""
    while rows := engine.reencoder.coldest([NS.root], 1):
        assert engine.reencoder.reencode(rows[0], lower(rows[0]), 0.25)
    engine.close()


def test_a_stop_at_any_call_leaves_either_the_old_blob_or_the_new_one(tmp_path: Path) -> None:
    """Everything that was stored is there, bit for bit, and nothing else; the work goes on where it was."""
    with Engine.open(tmp_path / "template", options()) as engine:
        put_auto(engine, TWO_BLOCKS)
    shutil.copytree(tmp_path / "template", tmp_path / "count")
    count = RecordingFs()
    work(Engine.open(tmp_path / "count", options(), count))
    assert len(count.calls) >= 20
    ranks = set()
    for at in range(len(count.calls)):
        data_dir, snapshot = tmp_path / f"{at}", tmp_path / f"{at}.stopped"
        shutil.copytree(tmp_path / "template", data_dir)
        with contextlib.suppress(Stopped):
            work(Engine.open(data_dir, options(), StoppingFs(at, data_dir, snapshot)))
        with Engine.open(snapshot, options()) as engine:
            require_sound(engine)
            match = find(engine, NS, TWO_BLOCKS)
            assert match.n_tokens == 300, count.calls[at]
            ranks.add(match.fidelity)
            while rows := engine.reencoder.coldest([NS.root], 1):
                assert engine.reencoder.reencode(rows[0], lower(rows[0]), 0.25)
            assert engine.reencoder.stats().held_blocks == 2
            require_sound(engine)
        shutil.rmtree(data_dir)
        shutil.rmtree(snapshot)
    assert ranks == {LOW, FIDELITY_EXACT}
