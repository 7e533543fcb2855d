"""Blobs that come out of a remote store: whole, verified, pinned, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.blobs.format import make_ready
from kvstore.core.blocks import BLOCK_TOKENS, FIDELITY_EXACT, Block
from kvstore.core.breaker import Deadline
from kvstore.core.limits import default_limits
from kvstore.errors import CorruptDataError, RemoteError
from kvstore.remote.finder import Finder, Reach
from kvstore.remote.object_names import Naming
from kvstore.remote.objects import extended, parse_blob, require_block
from kvstore.remote.tier import RemoteTier
from tests.support.engine import HYBRID, namespace, sequence
from tests.support.memory_objects import MemoryStore
from tests.support.remote_blobs import NS, blobs_of, chain_of, fill, found, name_of

N_TOKENS = 3 * BLOCK_TOKENS + 40
BLOBS = blobs_of(N_TOKENS)
ALL = [blob for _, blob in BLOBS]


def filled() -> tuple[MemoryStore, RemoteTier]:
    """With the whole prompt."""
    store = MemoryStore()
    fill(store, BLOBS)
    return store, RemoteTier(store, lambda item: None, None, default_limits(), sync=False)


def test_a_checkpoint_is_verified_like_a_block() -> None:
    """Its states stand in the header."""
    ns = namespace(layout=HYBRID)
    blobs = blobs_of(BLOCK_TOKENS + 7, ns, mark=True)
    store = MemoryStore()
    fill(store, blobs, ns)
    chain = chain_of(range(BLOCK_TOKENS + 7), ns)
    (mark,) = Finder(store).find(chain, Naming(ns.info), ("exact",), Deadline(60)).checkpoints
    block, blob = blobs[-1]
    assert require_block(parse_blob(memoryview(blob)), mark, block.fidelity) == block
    with pytest.raises(CorruptDataError):
        require_block(blobs[0][0], mark, 0)


@given(which=st.integers(0, 3), at=st.floats(0, 1, exclude_max=True), patch=st.integers(1, 255), cut=st.booleans())
@settings(max_examples=150, deadline=None)
def test_no_changed_byte_is_ever_taken(which: int, at: float, patch: int, cut: bool) -> None:
    """Anywhere in header or payload; nor is a blob that is cut short. What comes before is not affected."""
    store, tier = filled()
    block, blob = BLOBS[which]
    place = int(at * len(blob))
    damaged = blob[:place] if cut else blob[:place] + bytes([blob[place] ^ patch]) + blob[place + 1 :]
    store.put(name_of(block), damaged)
    assert found(tier, N_TOKENS, 60) == ALL[:which]
    assert tier.stats().wrong_objects == 1


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
def test_a_sound_blob_of_something_else_is_not_taken(make: Callable[[Block], bytes]) -> None:
    """The name promised a block."""
    store, tier = filled()
    store.put(name_of(BLOBS[1][0]), make(BLOBS[1][0]))
    assert found(tier, N_TOKENS, 60) == ALL[:1]
    assert tier.stats().wrong_objects == 1


def test_what_changed_since_it_was_found_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it is the same again: every byte of a blob is of one object. That is nobody's fault."""
    store, tier = filled()
    read_all = store.read_all

    def later(*given: object) -> object:
        store.put(name_of(BLOBS[2][0]), BLOBS[2][1])
        return read_all(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "read_all", later)
    assert found(tier, N_TOKENS, 60) == ALL[:2]
    assert not tier.stats().wrong_objects


def test_a_store_that_fails_or_is_late_gives_nothing_and_is_counted() -> None:
    """A late read says how slow the link is at least."""
    store, tier = filled()
    store.fail = RemoteError("refused")
    assert found(tier, N_TOKENS, 60) == []
    store.fail, store.delay_s = None, 0.2
    assert found(tier, N_TOKENS, 0.05) == []
    assert (tier.stats().requests.failed, tier.stats().requests.late) == (1, 1)


def diverging(n_shared: int, first: int) -> list[tuple[Block, bytes]]:
    """Blocks of a prompt that goes on differently after `n_shared` tokens."""
    tokens = [*range(n_shared), *range(first, first + 300)]
    blobs = []
    for new in sequence(NS, tokens):
        ready = make_ready(replace(new.block, namespace=NS.to_record()), new.buffers)
        blobs.append((ready.block, ready.header + b"".join(ready.payload)))
    return blobs


def reach_of(store: MemoryStore, n_tokens: int) -> Reach:
    """What is found of a prompt, with the block in which others part from it."""
    finder, chain, naming = Finder(store), chain_of(range(n_tokens)), Naming(NS.info)
    return extended(store, finder.find(chain, naming, ["exact"], Deadline(60)), chain, naming, Deadline(60))


def test_a_block_that_goes_on_differently_gives_what_it_shares() -> None:
    """The best of a few, in one more round trip; it is the block that the promotion then requires."""
    store = MemoryStore()
    for shared, first in ((256 + 150, 50_000), (256 + 220, 60_000), (256 + 20, 70_000)):
        fill(store, diverging(shared, first))
    reach = reach_of(store, 600)
    assert (reach.n_tokens, len(reach.blocks)) == (256 + 220, 2)
    assert store.rounds.count("read") == 1
    name = reach.blocks[-1].name
    block = require_block(parse_blob(memoryview(store.objects[name][1])), reach.blocks[-1], FIDELITY_EXACT)
    assert block.tokens.startswith(chain_of(range(256, 256 + 220)).tokens)


def test_others_are_not_looked_into_for_less_than_half_a_block() -> None:
    """Nor is a block taken that shares less, or whose name is not its own."""
    store = MemoryStore()
    fill(store, diverging(256 + 220, 50_000))
    assert reach_of(store, 256 + 100).n_tokens == 256
    fill(store, blobs_of(256 + 130))
    assert reach_of(store, 256 + 255).n_tokens == 256 + 130
    assert store.rounds.count("read") == 0
    alone = MemoryStore()
    fill(alone, diverging(256 + 20, 50_000))
    assert reach_of(alone, 600).n_tokens == 256
    of_other = name_of(diverging(256 + 20, 50_000)[1][0])
    other = diverging(256 + 220, 60_000)[1][1]
    alone.put(of_other, other)
    assert reach_of(alone, 600).n_tokens == 256
    alone.put(of_other, b"no blob")
    assert reach_of(alone, 600).n_tokens == 256
