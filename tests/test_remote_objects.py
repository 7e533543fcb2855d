"""Blobs that come out of a remote store: whole, verified, pinned, or an error that says why."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.blobs import format as blob_format
from kvstore.blobs.format import make_ready
from kvstore.core.blocks import BLOCK_TOKENS, FIDELITY_EXACT, Block
from kvstore.core.breaker import Deadline
from kvstore.errors import CorruptDataError, DeadlineError, KVStoreError, ObjectChangedError, RemoteError
from kvstore.remote import objects
from kvstore.remote.finder import Finder, RemoteBlock
from kvstore.remote.object_names import Naming
from kvstore.remote.object_store import ByteRange
from kvstore.remote.objects import Pulled, RemoteReader, pull
from tests.support.engine import HYBRID, namespace, sequence
from tests.support.memory_objects import MemoryStore
from tests.support.remote_blobs import NS, blobs_of, chain_of, fill, name_of

N_TOKENS = 3 * BLOCK_TOKENS + 40
BLOBS = blobs_of(N_TOKENS)
LABELS = ("exact", "b8")


def soon() -> Deadline:
    """A deadline that does not decide."""
    return Deadline(60)


def found(store: MemoryStore) -> list[RemoteBlock]:
    """The blocks of the prompt."""
    reach = Finder(store).find(chain_of(range(N_TOKENS)), Naming(NS.info), LABELS, soon())
    return list(reach.blocks)


def filled() -> MemoryStore:
    """With the whole prompt."""
    store = MemoryStore()
    fill(store, BLOBS)
    return store


def test_blobs_come_back_whole_in_one_round_trip() -> None:
    """As they were put, with their blocks."""
    store = filled()
    blocks = found(store)
    store.rounds.clear()
    pulled = pull(store, blocks, FIDELITY_EXACT, soon())
    assert store.rounds == ["read"]
    assert [(one.block, bytes(one.blob)) for one in pulled if isinstance(one, Pulled)] == BLOBS


def test_a_checkpoint_comes_back() -> None:
    """Like a block."""
    ns = namespace(layout=HYBRID)
    blobs = blobs_of(BLOCK_TOKENS + 7, ns, mark=True)
    store = MemoryStore()
    fill(store, blobs, ns)
    reach = Finder(store).find(chain_of(range(BLOCK_TOKENS + 7), ns), Naming(ns.info), LABELS, soon())
    (mark,) = reach.checkpoints
    (one,) = pull(store, [mark], FIDELITY_EXACT, soon())
    assert isinstance(one, Pulled)
    assert one.block.is_checkpoint
    assert bytes(one.blob) == blobs[-1][1]


@given(which=st.integers(0, 3), at=st.floats(0, 1, exclude_max=True), patch=st.integers(1, 255), cut=st.booleans())
@settings(max_examples=150, deadline=None)
def test_no_changed_byte_is_ever_taken(which: int, at: float, patch: int, cut: bool) -> None:
    """Anywhere in header or payload; nor is a blob that is cut short. The others are not affected."""
    store = filled()
    block, blob = BLOBS[which]
    place = int(at * len(blob))
    damaged = blob[:place] if cut else blob[:place] + bytes([blob[place] ^ patch]) + blob[place + 1 :]
    store.put(name_of(block), damaged)
    pulled = pull(store, found(store), FIDELITY_EXACT, soon())
    assert isinstance(pulled[which], KVStoreError)
    assert [n for n, one in enumerate(pulled) if isinstance(one, Pulled)] == [n for n in range(4) if n != which]


def other_tokens(block: Block) -> bytes:
    """A sound blob of the same place in another prompt."""
    return blobs_of(N_TOKENS, first=7)[block.start // BLOCK_TOKENS][1]


def other_namespace(block: Block) -> bytes:
    """A sound blob of the same tokens for another model."""
    return blobs_of(N_TOKENS, namespace("other"))[block.start // BLOCK_TOKENS][1]


def lower_rank(block: Block) -> bytes:
    """A sound blob that says that it is worse than its name."""
    return blobs_of(N_TOKENS, fidelity=300)[block.start // BLOCK_TOKENS][1]


def lying_namespace(block: Block) -> bytes:
    """A blob that carries another namespace's record."""
    new = sequence(NS, range(N_TOKENS))[block.start // BLOCK_TOKENS]
    ready = make_ready(replace(new.block, namespace=namespace("other").to_record()), new.buffers)
    return ready.header + b"".join(ready.payload)


@pytest.mark.parametrize("make", [other_tokens, other_namespace, lower_rank, lying_namespace])
def test_a_sound_blob_of_something_else_is_not_taken(make: object) -> None:
    """The name promised a block."""
    store = filled()
    block, _ = BLOBS[1]
    store.put(name_of(block), make(block))  # type: ignore[operator]
    blocks = found(store)
    assert isinstance(pull(store, blocks, FIDELITY_EXACT, soon())[1], CorruptDataError)
    opened, reason = RemoteReader(store, blocks, FIDELITY_EXACT, soon()).open()
    assert len(opened) == 1
    assert isinstance(reason, CorruptDataError)


def test_what_changed_since_it_was_found_is_not_taken() -> None:
    """Even if it is the same again: every byte of a blob is of one object."""
    store = filled()
    blocks = found(store)
    store.put(*[(name_of(block), blob) for block, blob in BLOBS][2])
    store.delete([name_of(BLOBS[3][0])], soon())
    pulled = pull(store, blocks, FIDELITY_EXACT, soon())
    assert [type(one) for one in pulled] == [Pulled, Pulled, ObjectChangedError, ObjectChangedError]
    opened, reason = RemoteReader(store, blocks, FIDELITY_EXACT, soon()).open()
    assert len(opened) == 2
    assert isinstance(reason, ObjectChangedError)


def test_a_store_that_fails_or_is_late_says_so() -> None:
    """Nothing came at all."""
    store = filled()
    blocks = found(store)
    store.fail = RemoteError("refused")
    with pytest.raises(RemoteError):
        pull(store, blocks, FIDELITY_EXACT, soon())
    store.fail, store.delay_s = None, 0.2
    with pytest.raises(DeadlineError):
        pull(store, blocks, FIDELITY_EXACT, Deadline(0.05))


@pytest.mark.parametrize("guess", [1 << 16, 8, 100])
def test_layers_are_read_in_two_round_trips_each_verified(guess: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers, then one for the ranges of each layer; a third where headers are longer than was guessed."""
    monkeypatch.setattr(objects, "HEADER_GUESS_BYTES", guess)
    store = filled()
    blocks = found(store)
    store.rounds.clear()
    reader = RemoteReader(store, blocks, FIDELITY_EXACT, soon())
    opened, reason = reader.open()
    assert reason is None
    assert opened == [block for block, _ in BLOBS]
    ranges = [(n, [(at, size) for at, size, _ in blob_format.checked_ranges(block)]) for n, block in enumerate(opened)]
    reader.load([(number, ByteRange(at, size)) for number, some in ranges for at, size in some[:2]])
    assert len(store.rounds) == 2 + (guess < 1 << 16)
    payloads = [blob[-blob_format.payload_bytes(block) :] for block, blob in BLOBS]
    for number, some in ranges:
        for at, size in some[:2]:
            view = bytearray(size)
            reader.readinto(number, at, [memoryview(view)[:3], memoryview(view)[3:]])
            assert view == payloads[number][at : at + size]
    assert len(store.rounds) == 2 + (guess < 1 << 16)
    last = ranges[0][1][-1]
    view = bytearray(last[1])
    reader.readinto(0, last[0], [memoryview(view)])
    assert view == payloads[0][last[0] : sum(last)]


def test_ranges_that_cannot_be_had_are_corrupt_as_for_any_reader() -> None:
    """Whoever assembles a hit knows one error."""
    store = filled()
    reader = RemoteReader(store, found(store), FIDELITY_EXACT, soon())
    reader.open()
    store.delete([name_of(BLOBS[1][0])], soon())
    with pytest.raises(CorruptDataError):
        reader.load([(1, ByteRange(0, 4))])
    reader.load([])
    for source, offset in ((1, 0), (9, 0), (0, -1), (0, 1 << 30)):
        with pytest.raises(CorruptDataError):
            reader.readinto(source, offset, [memoryview(bytearray(4))])
