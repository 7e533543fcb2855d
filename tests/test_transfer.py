"""Blobs from one engine to another: what goes, in which order, what is refused, and what a full or busy store does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.core.blocks import FIDELITY_EXACT, Reason, pack_tokens
from kvstore.core.keys import Chain, Namespace, differing_fields
from kvstore.engine import Engine, Selection
from kvstore.errors import CorruptDataError, InvalidRequestError, KVStoreError, LimitError, NotFoundError
from kvstore.index.table import AUTO
from tests.support.engine import (
    HYBRID,
    blob_path,
    blob_paths,
    checkpoint,
    chosen_by_auto,
    find,
    namespace,
    options,
    put,
    put_checkpoint,
    require_sound,
    sequence,
)
from tests.support.packs import PACKED, TOKENS, blobs_of, importer_of, pieces_of, shipped, take_in

NS = namespace("moved", HYBRID)
LONG = list(range(1100))
FORKED = [*range(512), *range(5000, 5400)]
KEY = bytes(range(32))


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Engine]:
    """Two sequences that share two blocks, checkpoints inside and at the ends; and another namespace."""
    with Engine.open(tmp_path / "source", options(master_key=KEY, durability="none")) as engine:
        put(engine, NS, LONG)
        put(engine, NS, FORKED)
        for tokens in (LONG[:300], LONG[:512], LONG, FORKED):
            put_checkpoint(engine, NS, tokens)
        put(engine, namespace("other"), range(300))
        yield engine


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Engine]:
    """An empty store."""
    with Engine.open(tmp_path / "target", options(master_key=KEY, durability="none")) as engine:
        yield engine
        if not engine.is_displaced():
            require_sound(engine)


def blobs_in(engine: Engine, ns: Namespace = NS) -> dict[str, bytes]:
    """The files of a namespace by key."""
    folder = engine._shared.directory.blobs / ns.root.hex()
    return {path.name.rpartition("-")[0]: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_namespace_arrives_bit_by_bit(source: Engine, target: Engine) -> None:
    """Blocks, tails and checkpoints; every prompt then matches as it did, and no other namespace comes along."""
    done = take_in(target, shipped(source, NS.root[:4]))
    assert (done.blobs, done.held, done.reason) == (11, 0, Reason.OK)
    assert blobs_in(target) == blobs_in(source) and len(blobs_in(target)) == 11
    for tokens in (LONG, FORKED, LONG[:900], [*LONG[:300], 7]):
        for exact in (False, True):
            assert find(target, NS, tokens, exact=exact).n_tokens == find(source, NS, tokens, exact=exact).n_tokens
    assert find(target, namespace("other"), range(300)).n_tokens == 0


def test_a_second_import_writes_nothing(source: Engine, target: Engine) -> None:
    """What is there is not written again, whether it came by import or from a worker."""
    put(target, NS, LONG[:512])
    first = take_in(target, shipped(source, NS.root))
    assert (first.held, first.stored) == (2, 9)
    before = target.stats().written_bytes
    again = take_in(target, shipped(source, NS.root))
    assert (again.held, again.new_bytes, again.stored) == (11, 0, 0)
    assert target.stats().written_bytes == before


def test_what_auto_chose_elsewhere_is_as_if_it_had_been_named_here(target: Engine) -> None:
    """Only what the profile `auto` of this store chose may be re-encoded."""
    blocks = [chosen_by_auto(new) for new in sequence(NS, LONG)]
    take_in(target, pieces_of(blobs_of(blocks, NS.to_record())))
    assert find(target, NS, LONG).n_tokens == len(LONG)
    assert not (target._shared.index.table.rows["flags"] & AUTO).any()


def test_a_key_selects_its_chain_and_the_checkpoints_along_it(source: Engine, target: Engine) -> None:
    """Not the sequence that forks off, and nothing after the key."""
    keys = Chain(NS.root, pack_tokens(LONG)).block_keys()
    done = take_in(target, shipped(source, key_prefix=keys[1]))
    assert done.blobs == 4  # two blocks, the checkpoints after 300 and 512
    assert find(target, NS, LONG).n_tokens == 512 and find(target, NS, LONG, exact=True).n_tokens == 512
    assert find(target, NS, LONG[:300], exact=True).n_tokens == 300
    whole = take_in(target, shipped(source, key_prefix=keys[-1][:6]))
    assert (whole.held, whole.stored) == (4, 4)
    assert find(target, NS, LONG, exact=True).n_tokens == len(LONG)


def test_the_key_of_a_checkpoint_selects_what_reaches_it(source: Engine, target: Engine) -> None:
    """Its blocks, and the tail that covers it."""
    take_in(target, shipped(source, key_prefix=Chain(NS.root, pack_tokens(FORKED)).checkpoint_key()))
    assert find(target, NS, FORKED, exact=True).n_tokens == len(FORKED)


def test_what_names_nothing_or_too_much_is_refused(source: Engine) -> None:
    """With a sentence."""
    for selected in ({"namespace_prefix": b"\0\0"}, {"key_prefix": b"\0\0\0"}):
        with pytest.raises(NotFoundError, match="starts so"):
            shipped(source, **selected)
    with pytest.raises(InvalidRequestError, match="more digits"):
        shipped(source, namespace_prefix=b"")


def test_encrypted_and_tenants_namespaces_stay(source: Engine, target: Engine) -> None:
    """Whoever has the file could read it, and a tenant's salt is in no file."""
    secret = namespace("secret")
    source.store(secret.to_record(), sequence(secret, range(300)), encryption=source.encrypt(secret.root))
    with pytest.raises(InvalidRequestError, match="is encrypted"):
        shipped(source, secret.root)
    salted = Namespace(weights=b"w", layout=HYBRID, dtype="F32", engine="test 1", salt=b"tenant")
    put(source, salted, range(300))
    with pytest.raises(InvalidRequestError, match="tenant"):
        shipped(source, salted.root)
    with pytest.raises(InvalidRequestError, match="tenant"):
        take_in(target, pieces_of(blobs_of(sequence(salted, range(300)), salted.to_record())))


def test_what_is_imported_into_an_encrypted_namespace_is_encrypted(source: Engine, target: Engine) -> None:
    """With the key of this store."""
    target.store(NS.to_record(), sequence(NS, range(50)), encryption=target.encrypt(NS.root))
    assert take_in(target, shipped(source, NS.root)).reason is Reason.OK
    assert find(target, NS, LONG).n_tokens == len(LONG)
    assert all(b"kvstore-block" in data for data in blobs_in(source).values())
    assert not any(b"kvstore-block" in data for data in blobs_in(target).values())


def test_an_export_goes_on_beside_stores_and_evictions(source: Engine, target: Engine) -> None:
    """What goes before its turn is left out with what comes after it; what is being read stays until it is read."""
    pieces = source.transfer.pieces(source.transfer.plan(NS.root))
    taken = [next(pieces)]
    source.evict(Selection(namespace_prefix=NS.root))
    put(source, NS, LONG)
    taken += list(pieces)
    done = take_in(target, taken)
    assert done.reason is Reason.OK and 1 <= done.blobs < 11
    assert not source._shared.deletions.leased()
    require_sound(source)


def test_an_export_that_is_given_up_lets_go(source: Engine) -> None:
    """Its lease ends with it."""
    pieces = source.transfer.pieces(source.transfer.plan(NS.root))
    next(pieces)
    assert source._shared.deletions.leased()
    pieces.close()
    assert not source._shared.deletions.leased()


def test_a_damaged_blob_is_not_handed_over(source: Engine, target: Engine) -> None:
    """It goes to quarantine, as if a reader had found it; its descendants do not come either."""
    row = source.match(Chain(NS.root, pack_tokens(LONG))).slices[1].row
    path = blob_path(source, row)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    done = take_in(target, shipped(source, NS.root))
    assert find(target, NS, LONG).n_tokens == 256 and done.blobs == 2  # the checkpoint inside is sound
    assert source.stats().quarantined == 1


def test_an_import_makes_room_and_stops_where_the_budget_ends(source: Engine, tmp_path: Path) -> None:
    """It evicts what was there, never what it brought itself: the latest used chains come first and stay."""
    pieces = shipped(source, NS.root)
    with Engine.open(tmp_path / "small", options(durability="none")) as small:
        put(small, namespace("old"), range(900))
        budget = small.used_bytes + 100_000
        small.limit(budget, 0)
        done = take_in(small, pieces)
        assert done.reason is Reason.STORE_FULL and "budget" in done.detail
        assert 0 < done.blobs < 11 and small.used_bytes <= budget
        assert find(small, namespace("old"), range(900)).n_tokens < 900
        assert len(blobs_in(small)) == done.blobs
        require_sound(small)


def test_an_import_does_not_bring_back_what_is_evicted_meanwhile(source: Engine, target: Engine) -> None:
    """An eviction of the namespace ends it."""
    importer = importer_of(target)
    pieces = shipped(source, NS.root)
    for blob_bytes, data in pieces[:4]:
        importer.take(blob_bytes, data)
    target.evict(Selection(all=True))
    for blob_bytes, data in pieces[4:]:
        importer.take(blob_bytes, data)
    assert importer.finish().reason is Reason.EVICTED
    importer.close()
    assert not blob_paths(target._shared.directory.root)


def test_memory_bounds_what_is_taken_in(source: Engine, target: Engine) -> None:
    """A batch ends where memory does; a blob that does not fit is refused, and nothing stays held."""
    pieces = shipped(source, NS.root)
    largest = max(nbytes for nbytes, _ in pieces)
    assert take_in(target, pieces, memory_bytes=largest).reason is Reason.OK
    target.evict(Selection(all=True))
    with pytest.raises(LimitError, match="memory_bytes"):
        take_in(target, pieces, memory_bytes=10)


def test_blobs_that_do_not_fit_together_are_refused(target: Engine) -> None:
    """Another namespace, no parent, a piece too many, one too few: nothing of it is seen."""
    record = PACKED.to_record()
    block, tail = blobs_of(sequence(PACKED, TOKENS), record)
    other = blobs_of(sequence(namespace("other"), range(30)), namespace("other").to_record())[0]
    lying = blobs_of(sequence(PACKED, TOKENS), namespace("other", HYBRID).to_record())[0]
    cases = {
        "one namespace": pieces_of([block, other]),
        "namespace says": pieces_of([lying]),
        "more bytes": [(len(block), block), (0, b"x")],
        "before the last": [(len(block), block[:100]), (len(tail), tail)],
        "not complete": [(len(block), block[:-1])],
        "header": [(5, b"abcde")],
    }
    for words, pieces in cases.items():
        with pytest.raises(KVStoreError, match=words):
            take_in(target, pieces)
        assert not blob_paths(target._shared.directory.root), words
    assert take_in(target, pieces_of([tail])).reason is Reason.DEPENDENCY_LOST
    assert not blob_paths(target._shared.directory.root)


def test_what_comes_after_a_block_that_was_re_encoded_arrives_with_it(target: Engine) -> None:
    """A tail that stayed as it was and a checkpoint, which is exact: a match has the least rank, as where they were."""
    record = PACKED.to_record()
    low, (_, tail) = sequence(PACKED, TOKENS, fidelity=400)[0], sequence(PACKED, TOKENS)
    done = take_in(target, pieces_of(blobs_of([low, tail, checkpoint(PACKED, TOKENS)], record)))
    assert (done.blobs, done.reason) == (3, Reason.OK)
    match = find(target, PACKED, TOKENS, exact=True)
    assert (match.n_tokens, match.fidelity) == (len(TOKENS), 400)
    assert find(target, PACKED, TOKENS, exact=True, fidelity_min=500).n_tokens == 0


def test_names_are_those_that_a_worker_may_give(target: Engine) -> None:
    """An alias is for reading alone, and short; an engine that is not for reading is refused."""
    loud = replace(PACKED, alias="\x1b[2J" + "x" * 3000)
    assert take_in(target, pieces_of(blobs_of(sequence(loud, range(40)), loud.to_record()))).stored == 1
    kept = target.namespace(loud.root)
    assert kept is not None and kept.alias.isprintable() and len(kept.alias) < 1000
    for named in (replace(PACKED, engine="mlx\n0"), replace(PACKED, dtype="x" * 4000)):
        with pytest.raises(InvalidRequestError):
            take_in(target, pieces_of(blobs_of(sequence(named, range(40)), named.to_record())))


def test_a_full_store_is_said_to_be_full_whatever_comes_after(source: Engine, tmp_path: Path) -> None:
    """The blob for which the last batch had to go is not tried by itself."""
    pieces = shipped(source, NS.root)
    with Engine.open(tmp_path / "small", options(durability="none")) as small:
        small.limit(small.used_bytes + 100_000, 0)
        done = take_in(small, pieces, memory_bytes=max(nbytes for nbytes, _ in pieces))
        assert done.reason is Reason.STORE_FULL and done.blobs == len(blobs_in(small)) > 0
        require_sound(small)


def test_states_that_break_a_rule_are_refused(target: Engine) -> None:
    """As from a worker: checksums are right, and no engine could go on from it."""
    new = checkpoint(PACKED, TOKENS)
    wrong = replace(new.block, states=())
    assert wrong.states != new.block.states
    buffers = [memoryview(bytes(memoryview(one).nbytes)) for one in new.buffers]
    buffers[2] = memoryview(b"\7")  # of booleans
    states = blobs_of([replace(new, buffers=buffers)], PACKED.to_record())
    with pytest.raises(InvalidRequestError, match="booleans"):
        take_in(target, pieces_of([*blobs_of(sequence(PACKED, TOKENS), PACKED.to_record()), *states]))


WHOLE = blobs_of([*sequence(PACKED, TOKENS), checkpoint(PACKED, TOKENS)], PACKED.to_record())


@settings(max_examples=60, deadline=None)
@given(blob=st.integers(0, 2), at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), size=st.integers(1, 4000))
def test_no_flipped_bit_is_stored(
    blob: int, at: float, bit: int, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whoever sends it, and however it is cut into pieces: it is refused, or stored as it was sent, never half."""
    sent = [bytearray(one) for one in WHOLE]
    sent[blob][int(at * len(sent[blob]))] ^= 1 << bit
    with Engine.open(tmp_path_factory.mktemp("flip") / "data", options(durability="none")) as engine:
        with pytest.raises(KVStoreError):
            take_in(engine, pieces_of(map(bytes, sent), size))
        assert not blobs_in(engine, PACKED)


def test_the_fields_in_which_identities_differ_are_named() -> None:
    """Weights, adapter, layout, dtype, engine; a salt where all others are equal."""
    base = Namespace(weights=b"w", layout=HYBRID, dtype="F32", engine="mlx-lm 0.32")
    assert differing_fields(base.info.identity, replace(base, alias="other").info.identity) == []
    for field, value in {"weights": b"v", "adapter": b"a", "engine": "mlx-lm 0.33", "salt": b"s"}.items():
        assert differing_fields(base.info.identity, replace(base, **{field: value}).info.identity) == [field]
    layout = namespace("x").layout
    assert differing_fields(base.info.identity, replace(base, layout=layout).info.identity) == ["layout"]


def test_a_rank_goes_with_its_block(source: Engine, target: Engine) -> None:
    """A lossy block stays one, and an exact one takes its place."""
    lossy = namespace("lossy")
    put(source, lossy, range(300), fidelity=800)
    put(target, lossy, range(256), fidelity=400)
    assert take_in(target, shipped(source, lossy.root)).stored == 2
    assert find(target, lossy, range(300)).fidelity == 800
    assert find(target, lossy, range(300), fidelity_min=FIDELITY_EXACT).n_tokens == 0
    with pytest.raises(CorruptDataError):
        take_in(target, pieces_of([b"\0" * 200]))
