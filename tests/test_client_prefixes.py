"""What a session remembers: blocks and checkpoints that the store holds."""

from __future__ import annotations

from kvstore.client.provenance import HeldPrefixes
from kvstore.core.blocks import pack_tokens
from kvstore.core.keys import Chain

ROOT = bytes(range(32))


def tokens(n: int, first: int = 0, *more: int) -> Chain:
    """A prompt of n tokens in a row, and of `more`."""
    return Chain(ROOT, pack_tokens([*range(first, first + n), *more]))


def test_whole_blocks_of_a_held_prefix_are_known() -> None:
    """A tail counts only for exactly its tokens."""
    held = HeldPrefixes()
    assert held.held_tokens(tokens(600)) == 0
    held.hold(tokens(600))
    assert held.held_tokens(tokens(600)) == 600
    assert held.held_tokens(tokens(599)) == 512
    assert held.held_tokens(tokens(700)) == 512
    assert held.held_tokens(tokens(200)) == 0
    assert held.held_tokens(tokens(300, 0, *range(9000, 9300))) == 256


def test_what_a_daemon_denies_is_forgotten() -> None:
    """From the first block that reaches beyond what it says it has."""
    held = HeldPrefixes()
    held.hold(tokens(1000))
    held.forget(tokens(1000), keep_tokens=600)
    assert held.held_tokens(tokens(1000)) == 512
    held.forget(tokens(1000))
    assert held.held_tokens(tokens(1000)) == 0


def test_the_memory_of_held_blocks_is_bounded() -> None:
    """What was used longest ago goes first; asking is using."""
    held = HeldPrefixes(limit=4)
    held.hold(tokens(512))
    held.hold(tokens(512, 10_000))
    assert held.held_tokens(tokens(512)) == 512
    held.hold(tokens(512, 20_000))
    assert held.held_tokens(tokens(512)) == 512
    assert held.held_tokens(tokens(512, 10_000)) == 0


def test_a_checkpoint_is_held_at_exactly_its_position() -> None:
    """One token more or less is another state; the tokens alone do not make it known."""
    held = HeldPrefixes()
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
    held = HeldPrefixes()
    branch = tokens(560, 0, *range(9000, 9020))
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
    held = HeldPrefixes(checkpoints_max=3)
    for n in (1, 2, 3):
        held.hold(tokens(n), checkpoint=True)
    assert held.holds_checkpoint(tokens(1))
    held.hold(tokens(4), checkpoint=True)
    assert [held.holds_checkpoint(tokens(n)) for n in (1, 2, 3, 4)] == [True, False, True, True]
