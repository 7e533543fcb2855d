"""Which KV came out of the store, and at which rank: one table per process, by weights and token chain."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.client.provenance import Provenance, weights_of
from kvstore.core.blocks import FIDELITY_EXACT, common_tokens, count_tokens, pack_tokens
from tests.support.synthetic import make_layout, make_namespace

ROOT, OTHER = bytes(range(32)), bytes(32)
RANKS = (450, 850, FIDELITY_EXACT)


def tokens(n: int, first: int = 0) -> bytes:
    """n packed tokens in a row."""
    return pack_tokens(list(range(first, first + n)))


def test_a_hit_is_recognised_in_what_extends_it_or_was_cut_from_it() -> None:
    """Also when the cache was trimmed back into the hit and went another way."""
    restored = Provenance()
    restored.remember(ROOT, tokens(300), 800)
    assert restored.restored(ROOT, tokens(500)) == (300, 800)
    assert restored.restored(ROOT, tokens(280)) == (280, 800)
    assert restored.restored(ROOT, tokens(200)) == (200, 800)
    assert restored.restored(ROOT, tokens(270) + tokens(300, 9000)) == (270, 800)
    assert restored.restored(ROOT, tokens(100) + tokens(300, 9000)) == (100, 800)
    assert restored.restored(ROOT, tokens(100, 5)) == (0, FIDELITY_EXACT)


def test_conversations_that_part_within_one_block_are_kept_apart() -> None:
    """Several slots of a server share a system prompt; each has a hit of its own."""
    restored = Provenance()
    for number in range(8):
        restored.remember(ROOT, tokens(256) + tokens(40, 1000 * number), 800 + number)
    for number in range(8):
        extended = tokens(256) + tokens(60, 1000 * number)
        assert restored.restored(ROOT, extended) == (296, 800)  # the shared block came with the least exact of them


def test_the_least_fidelity_of_what_is_shared_counts() -> None:
    """A block that came back at 4 bits once is not taken for better."""
    restored = Provenance()
    restored.remember(ROOT, tokens(256), 450)
    restored.remember(ROOT, tokens(600), 850)
    assert restored.restored(ROOT, tokens(256)) == (256, 450)
    assert restored.restored(ROOT, tokens(900)) == (600, 450)


def test_weights_are_named_without_layout_dtype_and_engine() -> None:
    """KV that an engine quantized, or another session holds, is of the same weights; another tenant's is not."""
    plain, other = make_layout(), make_layout(layers=5)
    one = weights_of(make_namespace(plain))
    assert one == weights_of(make_namespace(other)) and plain != other
    changed = [make_namespace(plain, "b"), make_namespace(plain, adapter=b"a"), make_namespace(plain, salt=b"s")]
    assert len({one, *map(weights_of, changed)}) == 4


def test_what_was_forgotten_counts_as_restored_at_the_lowest_rank() -> None:
    """The table is bounded; what it dropped stays marked, and what was never seen is still first-hand."""
    table = Provenance(blocks_max=3, ends_max=5)
    table.remember(ROOT, tokens(600, 50_000), 450)
    for number in range(40):
        table.remember(ROOT, tokens(600, 1000 * number), 850)
    assert table.restored(ROOT, tokens(600, 39_000)) == (600, 850)
    n_tokens, rank = table.restored(ROOT, tokens(900, 1000))
    assert (600 <= n_tokens < 632, rank) == (True, 450)
    n_tokens, rank = table.restored(ROOT, tokens(100, 1000) + tokens(800, 70_000))
    assert (100 <= n_tokens < 132, rank) == (True, 450), "cut back into a forgotten hit"
    assert table.restored(ROOT, tokens(600, 60_000)) == (0, FIDELITY_EXACT)
    assert table.restored(OTHER, tokens(600, 1000)) == (0, FIDELITY_EXACT)
    assert len(table._blocks) == 3
    assert sum(map(len, table._ends_of.values())) == len(table._ends) == 5


def sequence(n: int, branch: int) -> bytes:
    """Packed tokens of one of some branches, which part at 200, 400 and 600: inside a block."""
    ids = np.arange(n)
    ids[200 * branch :] += 10_000 * branch
    return pack_tokens(ids)


HITS = st.lists(
    st.tuples(st.sampled_from([ROOT, OTHER]), st.integers(0, 900), st.integers(0, 3), st.sampled_from(RANKS)),
    max_size=8,
)


def wanted(hits: list[tuple[bytes, int, int, int]], weights: bytes, asked: bytes) -> tuple[int, int]:
    """By brute force: the longest common prefix with any hit, the least rank of those that share a token."""
    shared = [(common_tokens(asked, sequence(n, branch)), rank) for w, n, branch, rank in hits if w == weights]
    return max((n for n, _ in shared), default=0), min((rank for n, rank in shared if n), default=FIDELITY_EXACT)


@given(HITS, st.integers(0, 900), st.integers(0, 3))
def test_the_table_says_what_comparing_with_every_hit_says(
    hits: list[tuple[bytes, int, int, int]], n_tokens: int, branch: int
) -> None:
    """Tokens and rank, against the definition."""
    table = Provenance(bits=1 << 12)
    for weights, n, other, rank in hits:
        table.remember(weights, sequence(n, other), rank)
    asked = sequence(n_tokens, branch)
    assert table.restored(ROOT, asked) == wanted(hits, ROOT, asked)


@settings(max_examples=200)
@given(HITS, st.integers(0, 900), st.integers(0, 3), st.integers(1, 4), st.integers(1, 4))
def test_a_table_of_any_size_never_takes_restored_kv_for_first_hand(
    hits: list[tuple[bytes, int, int, int]], n_tokens: int, branch: int, blocks_max: int, ends_max: int
) -> None:
    """What it has forgotten is too long by less than 32 tokens and of too low a rank, never the other way round."""
    table = Provenance(blocks_max, ends_max, bits=1 << 20)
    for weights, n, other, rank in hits:
        table.remember(weights, sequence(n, other), rank)
    asked = sequence(n_tokens, branch)
    found, rank = table.restored(ROOT, asked)
    least, highest = wanted(hits, ROOT, asked)
    assert least <= found <= (min(least + 31, count_tokens(asked)) if least else 0)
    assert rank <= highest
    assert rank >= min((one for weights, *_, one in hits if weights == ROOT), default=FIDELITY_EXACT)


@pytest.mark.parametrize("bits", [8, 64])
def test_a_filter_that_is_full_takes_everything_for_restored(bits: int) -> None:
    """Raw bytes are the price, not the values of somebody else."""
    table = Provenance(blocks_max=1, ends_max=1, bits=bits)
    for number in range(200):
        table.remember(ROOT, tokens(300, 1000 * number), 850)
    assert table.restored(ROOT, tokens(700, 900_000)) == (700, 850)
