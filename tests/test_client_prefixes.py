"""What a session remembers: blocks that the store holds, and KV that came out of it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvstore.blocks import FIDELITY_EXACT, TOKEN_BYTES, common_tokens, pack_tokens
from kvstore.client.prefixes import HeldPrefixes, RestoredPrefixes

ROOT = bytes(range(32))


def tokens(n: int, first: int = 0) -> bytes:
    """n packed tokens in a row."""
    return pack_tokens(list(range(first, first + n)))


def test_whole_blocks_of_a_held_prefix_are_known() -> None:
    """A tail counts only for exactly its tokens."""
    held = HeldPrefixes(ROOT)
    assert held.held_tokens(tokens(600)) == 0
    held.hold(tokens(600))
    assert held.held_tokens(tokens(600)) == 600
    assert held.held_tokens(tokens(599)) == 512
    assert held.held_tokens(tokens(700)) == 512
    assert held.held_tokens(tokens(200)) == 0
    assert held.held_tokens(tokens(300) + tokens(300, 9000)) == 256


def test_what_a_daemon_denies_is_forgotten() -> None:
    """From the first block that reaches beyond what it says it has."""
    held = HeldPrefixes(ROOT)
    held.hold(tokens(1000))
    held.forget(tokens(1000), keep_tokens=600)
    assert held.held_tokens(tokens(1000)) == 512
    held.forget(tokens(1000))
    assert held.held_tokens(tokens(1000)) == 0


def test_the_memory_of_held_blocks_is_bounded() -> None:
    """What was used longest ago goes first; asking is using."""
    held = HeldPrefixes(ROOT, limit=4)
    held.hold(tokens(512))
    held.hold(tokens(512, 10_000))
    assert held.held_tokens(tokens(512)) == 512
    held.hold(tokens(512, 20_000))
    assert held.held_tokens(tokens(512)) == 512
    assert held.held_tokens(tokens(512, 10_000)) == 0


def test_a_hit_is_recognised_in_what_extends_it_or_was_cut_from_it() -> None:
    """Also when the cache was trimmed back into the hit and went another way."""
    restored = RestoredPrefixes(ROOT)
    restored.remember(tokens(300), 800)
    assert restored.restored(tokens(500)) == (300, 800)
    assert restored.restored(tokens(280)) == (280, 800)
    assert restored.restored(tokens(200)) == (200, 800)
    assert restored.restored(tokens(270) + tokens(300, 9000)) == (270, 800)
    assert restored.restored(tokens(100) + tokens(300, 9000)) == (100, 800)
    assert restored.restored(tokens(100, 5)) == (0, FIDELITY_EXACT)


def test_conversations_that_part_within_one_block_are_kept_apart() -> None:
    """Several slots of a server share a system prompt; each has a hit of its own."""
    restored = RestoredPrefixes(ROOT)
    for number in range(8):
        restored.remember(tokens(256) + tokens(40, 1000 * number), 800 + number)
    for number in range(8):
        extended = tokens(256) + tokens(60, 1000 * number)
        assert restored.restored(extended) == (296, 800)  # the shared block came with the least exact of them


def test_the_least_fidelity_of_what_is_shared_counts() -> None:
    """A block that came back at 4 bits once is not taken for better."""
    restored = RestoredPrefixes(ROOT)
    restored.remember(tokens(256), 450)
    restored.remember(tokens(600), 850)
    assert restored.restored(tokens(256)) == (256, 450)
    assert restored.restored(tokens(900)) == (600, 450)


def test_the_memory_of_hits_is_bounded() -> None:
    """Blocks and ends each have their limit, and the index of ends shrinks with them."""
    restored = RestoredPrefixes(ROOT, blocks_max=3, ends_max=5)
    for number in range(40):
        restored.remember(tokens(600, 1000 * number), 800)
    assert restored.restored(tokens(600, 39_000)) == (600, 800)
    assert restored.restored(tokens(600, 1000)) == (0, FIDELITY_EXACT)
    assert len(restored._blocks) == 3
    assert sum(map(len, restored._ends_of.values())) == len(restored._ends) == 5


@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 3)), max_size=6), st.integers(0, 900), st.integers(0, 3))
def test_restored_is_the_longest_common_prefix_with_any_hit(
    hits: list[tuple[int, int]], n_tokens: int, branch: int
) -> None:
    """Against the definition."""

    def sequence(n: int, other: int) -> bytes:
        ids = np.arange(n)
        ids[200 * other :] += 10_000 * other  # branches part at 200, 400, 600: inside a block
        return pack_tokens(ids)

    restored = RestoredPrefixes(ROOT)
    for n, other in hits:
        restored.remember(sequence(n, other), 800)
    asked = sequence(n_tokens, branch)
    want = max((common_tokens(asked, sequence(n, other)) for n, other in hits), default=0)
    assert restored.restored(asked)[0] == want
    assert len(asked) == n_tokens * TOKEN_BYTES


def test_a_checkpoint_is_held_at_exactly_its_position() -> None:
    """One token more or less is another state; the tokens alone do not make it known."""
    held = HeldPrefixes(ROOT)
    held.hold(tokens(600))
    assert not held.holds_checkpoint(tokens(600))
    for n in (600, 512, 3):
        held.hold(tokens(n), checkpoint=True)
        assert held.holds_checkpoint(tokens(n))
        assert not held.holds_checkpoint(tokens(n - 1))
        assert not held.holds_checkpoint(tokens(n + 1))
        assert not held.holds_checkpoint(tokens(n, 1))


def test_checkpoints_beyond_what_a_daemon_has_are_forgotten() -> None:
    """Those of the sequence asked for only: not what is at the very position, before it, or on another branch."""
    held = HeldPrefixes(ROOT)
    branch = tokens(560) + tokens(20, 9000)
    for known in (tokens(100), tokens(512), tokens(580), tokens(600), tokens(1000), branch):
        held.hold(known, checkpoint=True)
    held.forget(tokens(990), keep_tokens=580)
    assert [held.holds_checkpoint(tokens(n)) for n in (100, 512, 580, 600, 1000)] == [True, True, True, False, True]
    assert held.holds_checkpoint(branch)
    held.forget(tokens(1000))
    assert not any(held.holds_checkpoint(tokens(n)) for n in (100, 512, 580, 1000))
    assert held.holds_checkpoint(branch)


def test_the_memory_of_checkpoints_is_bounded() -> None:
    """What was used longest ago goes first; asking is using."""
    held = HeldPrefixes(ROOT, checkpoints_max=3)
    for n in (1, 2, 3):
        held.hold(tokens(n), checkpoint=True)
    assert held.holds_checkpoint(tokens(1))
    held.hold(tokens(4), checkpoint=True)
    assert [held.holds_checkpoint(tokens(n)) for n in (1, 2, 3, 4)] == [True, False, True, True]
