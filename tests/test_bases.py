"""Aux blocks: there before the first block that refers to them, gone with the last, and never silently lost."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.core.blocks import Reason, pack_tokens
from kvstore.core.keys import Chain, Namespace, aux_key
from kvstore.engine import Engine, NewBlock, Selection, bases, check_directory
from kvstore.engine.bases import UNUSED_S
from kvstore.errors import InvalidRequestError
from tests.support.aux_blocks import (
    basis_of,
    counted,
    list_aux,
    new_aux,
    put_aux,
    put_referring,
    read_aux,
    referring,
    row_number,
)
from tests.support.engine import (
    RecordingFs,
    Stopped,
    StoppingFs,
    blob_paths,
    disk_usage,
    find,
    namespace,
    options,
    put,
    require_sound,
    sequence,
)
from tests.support.packs import shipped, take_in

NS, OTHER = namespace(), namespace("other")
ONE, TWO = basis_of(1), basis_of(2)
DIGESTS = {data: hashlib.sha256(data).digest() for data in (ONE, TWO)}
FIRST, SECOND = DIGESTS[ONE], DIGESTS[TWO]
LONG = list(range(600))
KEY = bytes(range(32))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A store with two bases, one of which three blocks refer to."""
    with Engine.open(tmp_path / "data", options(durability="none")) as engine:
        assert put_aux(engine, NS, ONE).reason is Reason.OK
        assert put_aux(engine, NS, TWO).reason is Reason.OK
        assert put_referring(engine, NS, LONG, FIRST).blocks == 3
        yield engine


def aux_file(engine: Engine, digest: bytes, ns: Namespace = NS) -> Path:
    """The file of an aux block."""
    (found,) = (engine._shared.directory.blobs / ns.root.hex()).glob(f"{aux_key(ns.root, digest).hex()}-*")
    return found


def damage(path: Path) -> None:
    """Change one byte of the payload."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_row_of_a_basis_is_looked_up_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bytes when they are read; when they are in memory, whether it is still there."""
    looks: list[str] = []
    for name in ("is_there", "read"):
        real = getattr(bases, name)
        monkeypatch.setattr(bases, name, lambda *args, name=name, real=real: (looks.append(name), real(*args))[1])
    for _ in range(2):
        assert engine.aux(NS.root, [FIRST]) == {FIRST: ONE}
    assert looks == ["read", "is_there"]


def test_a_basis_is_read_back_listed_and_counted_in_bytes(engine: Engine) -> None:
    """Its bytes under its digest, its cost in the namespace and in what `du` says, and it is no block."""
    assert (read_aux(engine, NS.root, FIRST), read_aux(engine, NS.root, SECOND)) == (ONE, TWO)
    assert read_aux(engine, OTHER.root, FIRST) is None and read_aux(engine, NS.root, bytes(32)) is None
    listed = {one.digest: one for one in list_aux(engine, NS.root)}
    assert {digest: (one.nbytes, one.blocks) for digest, one in listed.items()} == {
        FIRST: (len(ONE), 3),
        SECOND: (len(TWO), 0),
    }
    (usage,) = engine.stats().namespaces
    assert (usage.blocks, usage.tokens, usage.aux_blocks) == (3, 600, 2)
    assert usage.aux_bytes == sum(one.disk_bytes for one in listed.values()) == 2 * 8192
    assert engine.used_bytes == disk_usage(engine._shared.directory.root)
    require_sound(engine)


def test_a_block_without_its_basis_is_not_stored(engine: Engine) -> None:
    """Nor what follows it; with the basis in the same request it is."""
    third = basis_of(3)
    blocks = [referring(new, hashlib.sha256(third).digest()) for new in sequence(OTHER, LONG)]
    assert engine.store(OTHER.to_record(), blocks).reason is Reason.NO_BASIS
    assert find(engine, OTHER, LONG).n_tokens == 0 and blob_count(engine, OTHER) == 0
    receipt = engine.store(OTHER.to_record(), [new_aux(OTHER, third), *blocks])
    assert (receipt.blocks, receipt.reason) == (4, Reason.OK)
    assert find(engine, OTHER, LONG).n_tokens == 600
    require_sound(engine)


def blob_count(engine: Engine, ns: Namespace) -> int:
    """Files of a namespace."""
    return sum(1 for path in blob_paths(engine._shared.directory.root) if path.parent.name == ns.root.hex())


def test_bytes_that_are_not_those_of_the_digest_are_no_basis(engine: Engine) -> None:
    """The block says one digest, the buffer has another."""
    new = new_aux(OTHER, ONE)
    new.buffers = [TWO]
    with pytest.raises(InvalidRequestError, match="digest"):
        engine.store(OTHER.to_record(), [new])


def test_a_basis_goes_with_the_last_block_that_refers_to_it(engine: Engine) -> None:
    """Evicted leaf by leaf: the count goes down, the basis stays until none is left, and its file goes then."""
    # What nothing refers to yet is a leaf, and was stored before those blocks.
    engine.evict(Selection(bytes=1))
    assert row_number(engine, NS.root, SECOND) == -1
    for left in (2, 1):
        engine.evict(Selection(bytes=1))
        assert row_number(engine, NS.root, FIRST) == left
        assert read_aux(engine, NS.root, FIRST) == ONE
    engine.evict(Selection(bytes=1))
    assert row_number(engine, NS.root, FIRST) == -1 and read_aux(engine, NS.root, FIRST) is None
    assert not blob_paths(engine._shared.directory.root)
    require_sound(engine)


def test_an_eviction_of_a_namespace_takes_its_bases(engine: Engine) -> None:
    """The dry run says the same bytes; another namespace with the same basis keeps its own."""
    put_aux(engine, OTHER, ONE)
    put_referring(engine, OTHER, LONG, FIRST)
    said = engine.evict(Selection(namespace_prefix=NS.root), dry_run=True)
    done = engine.evict(Selection(namespace_prefix=NS.root))
    assert said.freed_bytes == done.freed_bytes and blob_count(engine, NS) == 0
    assert read_aux(engine, OTHER.root, FIRST) == ONE
    require_sound(engine)


def test_a_block_that_takes_the_place_of_another_moves_the_count(engine: Engine) -> None:
    """A longer tail under another basis: the first one loses a reference, the second gains it."""
    put_aux(engine, NS, TWO)
    assert put_referring(engine, NS, list(range(700)), SECOND, start=512).blocks == 1
    assert (row_number(engine, NS.root, FIRST), row_number(engine, NS.root, SECOND)) == (2, 1)
    assert counted(engine, NS.root) == {FIRST: 2, SECOND: 1}
    require_sound(engine)


def test_a_basis_whose_last_block_is_replaced_goes_with_it(tmp_path: Path) -> None:
    """A longer tail under another basis takes the place of the only block that referred to the first one."""
    with Engine.open(tmp_path / "data", options(durability="none")) as engine:
        put_aux(engine, NS, ONE)
        put_referring(engine, NS, LONG[:100], FIRST)
        put_aux(engine, NS, TWO)
        assert put_referring(engine, NS, LONG[:200], SECOND).reason is Reason.OK
        assert (row_number(engine, NS.root, FIRST), row_number(engine, NS.root, SECOND)) == (-1, 1)
        require_sound(engine)


def test_a_tail_that_grows_keeps_the_basis_that_it_alone_refers_to(tmp_path: Path) -> None:
    """The old tail goes in the transaction of the new one, in whatever order."""
    with Engine.open(tmp_path / "data", options(durability="none")) as engine:
        put_aux(engine, NS, ONE)
        for n_tokens in (100, 150, 200):
            assert put_referring(engine, NS, LONG[:n_tokens], FIRST).reason is Reason.OK
            assert row_number(engine, NS.root, FIRST) == 1 and read_aux(engine, NS.root, FIRST) == ONE
        require_sound(engine)


def test_room_for_a_store_takes_the_last_block_of_a_basis_and_not_the_basis(tmp_path: Path) -> None:
    """It is held for the store that needs it; once the store has ended it goes like any that is unused."""
    with Engine.open(tmp_path / "data", options(durability="none")) as engine:
        put_aux(engine, NS, ONE)
        put_referring(engine, NS, LONG, FIRST)
        blocks = [referring(new, FIRST) for new in sequence(NS, [7, *LONG])]

        def with_little_room() -> Iterator[NewBlock]:
            yield blocks[0]
            engine._evictor._run("budget", 1 << 40, frozenset())
            assert find(engine, NS, LONG).n_tokens == 0 and engine.has_aux(NS.root, [FIRST])
            yield from blocks[1:]

        receipt = engine.store(NS.to_record(), with_little_room())
        assert (receipt.blocks, receipt.reason) == (3, Reason.OK)
        assert row_number(engine, NS.root, FIRST) == 3 and not engine._shared.index.held
        require_sound(engine)


def test_a_namespace_that_is_evicted_during_a_store_takes_the_basis_and_the_store(tmp_path: Path) -> None:
    """What a person asked for is not held up."""
    with Engine.open(tmp_path / "data", options(durability="none")) as engine:
        put_aux(engine, NS, ONE)
        put_referring(engine, NS, LONG, FIRST)
        blocks = [referring(new, FIRST) for new in sequence(NS, [7, *LONG])]

        def evicted() -> Iterator[NewBlock]:
            yield blocks[0]
            engine.evict(Selection(namespace_prefix=NS.root))
            yield from blocks[1:]

        assert engine.store(NS.to_record(), evicted()).reason is Reason.EVICTED
        assert not list_aux(engine, NS.root) and not engine._shared.index.held
        require_sound(engine)


def test_a_basis_that_nothing_uses_expires(tmp_path: Path) -> None:
    """After UNUSED_S; one that a block refers to does not."""
    now = [2e9]
    with Engine.open(
        tmp_path / "data", options(durability="none"), clock=lambda: now[0], steady=lambda: now[0]
    ) as engine:
        put_aux(engine, NS, ONE)
        put_aux(engine, NS, TWO)
        put_referring(engine, NS, LONG, FIRST)
        now[0] += UNUSED_S - 10
        engine.maintain()
        assert row_number(engine, NS.root, SECOND) == 0
        now[0] += 20
        engine.maintain()
        assert (row_number(engine, NS.root, FIRST), row_number(engine, NS.root, SECOND)) == (3, -1)
        assert read_aux(engine, NS.root, FIRST) == ONE
        require_sound(engine)


def test_a_budget_smaller_than_a_basis_refuses_it_and_evicts_nothing(tmp_path: Path) -> None:
    """And one that holds it evicts its blocks, never the basis before them."""
    with Engine.open(tmp_path / "data", options(durability="none", budget_bytes=900_000)) as engine:
        put(engine, OTHER, LONG)
        assert put_aux(engine, NS, basis_of(1, 1_000_000)).reason is Reason.STORE_FULL
        assert find(engine, OTHER, LONG).n_tokens == 600
        assert put_aux(engine, NS, ONE).reason is Reason.OK
        for number in range(60):
            receipt = put_referring(engine, NS, [number, *range(1000)], FIRST)
            assert receipt.reason is Reason.OK
            assert read_aux(engine, NS.root, FIRST) == ONE
            assert row_number(engine, NS.root, FIRST) == counted(engine, NS.root)[FIRST]
        assert engine.stats().evictions and engine.used_bytes <= 900_000
        require_sound(engine)


@pytest.mark.parametrize("key", [b"", KEY], ids=["plain", "encrypted"])
def test_a_rebuilt_index_counts_the_references_again(tmp_path: Path, key: bytes) -> None:
    """From the headers of the blobs alone; and an encrypted basis lies encrypted."""
    made = options(durability="none", master_key=key)
    with Engine.open(tmp_path / "data", made) as engine:
        encryption = engine.encrypt(NS.root) if key else None
        engine.store(NS.to_record(), [new_aux(NS, ONE)], encryption=encryption)
        put_referring(engine, NS, LONG, FIRST)
        assert (ONE in aux_file(engine, FIRST).read_bytes()) == (not key)
    (tmp_path / "data" / "index" / "data.mdb").unlink()
    with Engine.open(tmp_path / "data", made) as engine:
        assert row_number(engine, NS.root, FIRST) == 3 and read_aux(engine, NS.root, FIRST) == ONE
        assert engine.check().findings == []
        engine.evict(Selection(all=True))
        assert not blob_paths(tmp_path / "data")


@pytest.mark.parametrize("is_gone", [False, True], ids=["sound", "gone"])
def test_blocks_whose_keys_are_missing_take_their_bases_along(tmp_path: Path, is_gone: bool) -> None:
    """What an encrypted row refers to cannot be read then; with the last of them the namespace is empty."""
    made = options(durability="none", master_key=KEY, keys_dir=tmp_path / "keys")
    with Engine.open(tmp_path / "data", made) as engine:
        engine.store(NS.to_record(), [new_aux(NS, ONE)], encryption=engine.encrypt(NS.root))
        put_referring(engine, NS, LONG, FIRST)
        found = aux_file(engine, FIRST)
    shutil.rmtree(tmp_path / "keys")
    if is_gone:
        found.unlink()
    with Engine.open(tmp_path / "data", made) as engine:
        assert read_aux(engine, NS.root, FIRST) is None
        if is_gone:
            assert {one.kind for one in engine.check(repair=True).findings} == {"key_missing", "missing_blob"}
            assert engine._shared.index.table.usage().aux_blocks == 0
        engine.evict(Selection(namespace_prefix=NS.root))
        assert not blob_paths(tmp_path / "data") and engine.stats().blobs == 0


def test_a_damaged_basis_makes_its_blocks_misses_and_deletes_none(engine: Engine) -> None:
    """It goes to quarantine; the same bytes, put again, make them hits again with the count that they had."""
    damage(aux_file(engine, FIRST))
    assert read_aux(engine, NS.root, FIRST) is None
    assert engine.stats().quarantined == 1 and not engine.has_aux(NS.root, [FIRST])
    assert find(engine, NS, LONG).n_tokens == 600  # the blocks are there; who decodes them asks `has_aux`
    assert [one.kind for one in engine.check().findings] == ["missing_basis"]
    assert engine.check(repair=True).repaired == 0 and find(engine, NS, LONG).n_tokens == 600
    assert put_referring(engine, NS, [7, 8, 9], FIRST).reason is Reason.NO_BASIS
    assert put_aux(engine, NS, ONE).reason is Reason.OK
    assert engine.has_aux(NS.root, [FIRST]) and read_aux(engine, NS.root, FIRST) == ONE
    assert row_number(engine, NS.root, FIRST) == 3
    require_sound(engine)


def test_a_lost_basis_goes_with_its_blocks(engine: Engine) -> None:
    """Its row has no blob, and goes with the last block all the same."""
    damage(aux_file(engine, FIRST))
    assert engine.recheck(aux_key(NS.root, FIRST)) and not engine.recheck(aux_key(NS.root, FIRST))
    engine.evict(Selection(namespace_prefix=NS.root))
    assert row_number(engine, NS.root, FIRST) == -1 and not blob_paths(engine._shared.directory.root)
    require_sound(engine)


def test_a_scrub_finds_a_damaged_basis(tmp_path: Path) -> None:
    """It is read like any other blob."""
    with Engine.open(tmp_path / "data", options(scrub_bytes_per_s=1 << 30, durability="none")) as engine:
        put_aux(engine, NS, ONE)
        put_referring(engine, NS, LONG, FIRST)
        damage(aux_file(engine, FIRST))
        engine._scrub._stepped -= 10
        engine.scrub()
        assert engine._scrub.damaged == 1 and engine.stats().quarantined == 1
        assert find(engine, NS, LONG).n_tokens == 600


@pytest.mark.parametrize("how", ["rebuild", "sweep", "repair", "offline"])
def test_a_basis_that_is_gone_leaves_its_blocks(tmp_path: Path, how: str) -> None:
    """Whoever finds that its file is not there: its blocks stay, and it can be put again."""
    data_dir = tmp_path / "data"
    with Engine.open(data_dir, options()) as engine:
        put_aux(engine, NS, ONE)
        put_referring(engine, NS, LONG, FIRST)
        gone = aux_file(engine, FIRST)
        if how == "sweep":
            shutil.copytree(data_dir, tmp_path / "copy")
    if how == "sweep":
        data_dir = tmp_path / "copy"
        gone = data_dir / gone.relative_to(tmp_path / "data")
    gone.unlink()
    if how == "rebuild":
        (data_dir / "index" / "data.mdb").unlink()
    if how == "offline":
        assert "missing_blob" in {one.kind for one in check_directory(data_dir, repair=True).findings}
    with Engine.open(data_dir, options()) as engine:
        if how == "repair":
            engine.check(repair=True)
        assert find(engine, NS, LONG).n_tokens == 600 and not engine.has_aux(NS.root, [FIRST])
        put_aux(engine, NS, ONE)
        assert row_number(engine, NS.root, FIRST) == 3
        require_sound(engine)


def test_a_count_that_is_off_is_found_and_put_right(engine: Engine) -> None:
    """Too high, too low, and a row that is missing altogether."""
    shared = engine._shared
    for change in (+2, -1):
        with shared.lock, shared.index.edit() as edit:
            edit.table.refer(aux_key(NS.root, FIRST), change)
        assert [one.kind for one in engine.check(repair=True).findings] == ["row"]
        assert row_number(engine, NS.root, FIRST) == 3
        require_sound(engine)


def test_bases_move_with_export_and_import(engine: Engine, tmp_path: Path) -> None:
    """Before the blocks that need them; a second import writes nothing; one chain takes only what it needs."""
    with Engine.open(tmp_path / "target", options(durability="none")) as target:
        pieces = shipped(engine, NS.root)
        done = take_in(target, pieces)
        assert (done.blobs, done.held, done.reason) == (5, 0, Reason.OK)
        assert read_aux(target, NS.root, FIRST) == ONE and row_number(target, NS.root, FIRST) == 3
        assert take_in(target, pieces).stored == 0
        require_sound(target)
        target.evict(Selection(all=True))
        key = Chain(NS.root, pack_tokens(LONG)).keys()[0]
        assert take_in(target, shipped(engine, key_prefix=key)).blobs == 2
        assert row_number(target, NS.root, FIRST) == 1 and row_number(target, NS.root, SECOND) == -1
        target.evict(Selection(all=True))
        starts = [at for at, (nbytes, _) in enumerate(pieces) if nbytes]
        done = take_in(target, pieces[starts[2] :])
        assert (done.stored, done.reason) == (0, Reason.NO_BASIS) and "basis" in done.detail


def test_a_lost_basis_is_not_exported_nor_are_its_blocks(engine: Engine) -> None:
    """They are of no use without it."""
    put(engine, NS, [5, *LONG])
    damage(aux_file(engine, FIRST))
    engine.recheck(aux_key(NS.root, FIRST))
    assert sum(1 for nbytes, _ in shipped(engine, NS.root) if nbytes) == 4  # the other basis and the plain blocks


def works() -> dict[str, Callable[[Engine], object]]:
    """What is killed at every point."""
    return {
        "put": lambda engine: put_aux(engine, NS, TWO),
        "first block": lambda engine: put_referring(engine, NS, [1, *LONG], SECOND),
        "last block": lambda engine: engine.evict(Selection(namespace_prefix=NS.root, bytes=1 << 20)),
        "namespace": lambda engine: engine.evict(Selection(namespace_prefix=NS.root)),
        "import": lambda engine: take_in(engine, PACK),
    }


with (
    tempfile.TemporaryDirectory() as _folder,
    Engine.open(Path(_folder) / "data", options(durability="none")) as _source,
):
    put_aux(_source, OTHER, TWO)
    put_referring(_source, OTHER, LONG, SECOND)
    PACK = shipped(_source, OTHER.root)


@pytest.mark.parametrize("name", ["put", "first block", "last block", "namespace", "import"])
def test_a_stop_leaves_counts_that_are_right(tmp_path: Path, name: str) -> None:
    """At a third of the calls; the fault harness takes all. The directory as it is at that moment, opened by a new
    engine: no block without its basis, nothing left over."""
    template = tmp_path / "template"
    with Engine.open(template, options()) as engine:
        put_aux(engine, NS, ONE)
        put_referring(engine, NS, LONG, FIRST)
        if name == "first block":
            put_aux(engine, NS, TWO)
        if name == "import":
            put(engine, OTHER, [7, 8, 9])
    shutil.copytree(template, tmp_path / "count")
    fs = RecordingFs()
    with Engine.open(tmp_path / "count", options(), fs) as engine:
        before = len(fs.calls)
        works()[name](engine)
        after = len(fs.calls)
    assert after - before > 5
    for at in range(before, after, 3):
        data_dir, snapshot = tmp_path / f"d{at}", tmp_path / f"s{at}"
        shutil.copytree(template, data_dir)
        stopped = Engine.open(data_dir, options(), StoppingFs(at, data_dir, snapshot))
        with pytest.raises(Stopped):
            works()[name](stopped)
        with Engine.open(snapshot, options()) as engine:
            engine.maintain()  # frees what a namespace that was evicted left
            require_sound(engine)
            require_counted(engine)
            assert works()[name](engine)
            require_sound(engine)


def require_counted(engine: Engine) -> None:
    """Every count is that of the rows, and every block's basis is there."""
    for ns in (NS, OTHER):
        said = {one.digest: one.blocks for one in list_aux(engine, ns.root)}
        rows = counted(engine, ns.root)
        assert {digest: blocks for digest, blocks in said.items() if blocks} == rows
        assert engine.has_aux(ns.root, rows)


ACTIONS = st.one_of(
    st.tuples(st.just("put"), st.sampled_from([NS, OTHER]), st.sampled_from([ONE, TWO])),
    st.tuples(
        st.just("store"), st.sampled_from([NS, OTHER]), st.sampled_from([[FIRST], [SECOND], [FIRST, SECOND], []])
    ),
    st.tuples(st.just("evict"), st.sampled_from([NS, OTHER]), st.sampled_from([1, 20_000, 0])),
    st.tuples(st.just("damage"), st.sampled_from([NS, OTHER]), st.sampled_from([FIRST, SECOND])),
    st.tuples(st.sampled_from(["reopen", "rebuild"]), st.just(NS), st.none()),
)


@settings(max_examples=12, deadline=None)
@given(st.lists(ACTIONS, min_size=3, max_size=14))
def test_counts_are_those_of_brute_force(actions: list[tuple[str, Namespace, object]]) -> None:
    """Whatever is put, stored, evicted, damaged, reopened and rebuilt: the rows say how many refer to each basis."""
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "data"
        engine = Engine.open(data_dir, options(durability="none"))
        lost: set[tuple[bytes, bytes]] = set()
        for number, (action, ns, what) in enumerate(actions):
            if action == "put":
                assert isinstance(what, bytes)
                assert put_aux(engine, ns, what).reason is Reason.OK
                lost.discard((ns.root, DIGESTS[what]))
            elif action == "store":
                assert isinstance(what, list)
                is_whole = engine.has_aux(ns.root, what)
                receipt = put_referring(engine, ns, [number % 3, *range(300 + 40 * number)], *what)
                assert receipt.reason is (Reason.OK if is_whole else Reason.NO_BASIS)
            elif action == "evict":
                assert isinstance(what, int)
                engine.evict(Selection(namespace_prefix=ns.root, bytes=what))
            elif action == "damage":
                assert isinstance(what, bytes)
                if engine.has_aux(ns.root, [what]):
                    damage(aux_file(engine, what, ns))
                    assert read_aux(engine, ns.root, what) is None
                    lost.add((ns.root, what))
            else:
                engine.close()
                if action == "rebuild":
                    (data_dir / "index" / "data.mdb").unlink()
                engine = Engine.open(data_dir, options(durability="none"))
            for space in (NS, OTHER):
                rows = counted(engine, space.root)
                said = {one.digest: one for one in list_aux(engine, space.root)}
                assert {digest: one.blocks for digest, one in said.items() if one.blocks} == rows
                for digest in (FIRST, SECOND):
                    is_lost = (space.root, digest) in lost
                    assert not (is_lost and engine.has_aux(space.root, [digest]))
                    assert digest not in rows or is_lost or engine.has_aux(space.root, [digest])
            assert {one.kind for one in engine.check().findings} <= {"missing_basis"}
        engine.evict(Selection(all=True))
        assert not blob_paths(data_dir) and len(engine._shared.index.table) == 0
        engine.close()
