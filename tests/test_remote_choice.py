"""Which part of what the remote tier has is read: what saves time over this link, for this caller, in its time."""

from __future__ import annotations

import pytest

from kvstore.core.blocks import BLOCK_TOKENS, Reason
from kvstore.core.breaker import Deadline
from kvstore.core.keys import Chain
from kvstore.engine import Match
from kvstore.remote.finder import Reach, RemoteBlock
from kvstore.remote.link import Link
from kvstore.remote.object_store import Head
from kvstore.server.fetching.costs import Offer
from kvstore.server.tier.remote_choice import FIND_SHARE, Choice, Want, choose, options
from kvstore.wire.v1 import kvstore_pb2 as pb

N_BLOCKS = 32
# What 8 bits a value keep of 128 KiB of raw KV a token.
BLOCK_BYTES = BLOCK_TOKENS * (66 << 10)
TOKENS = bytes(8 * (N_BLOCKS * BLOCK_TOKENS + 1))


def block(number: int, n_tokens: int = BLOCK_TOKENS, *, is_checkpoint: bool = False) -> RemoteBlock:
    """A block that was found."""
    head = Head("etag", BLOCK_BYTES)
    tokens, start = bytes(8 * n_tokens), number * BLOCK_TOKENS
    return RemoteBlock(f"{number}", head, "b8", b"r", b"p", bytes([number]), tokens, start, is_checkpoint)


BLOCKS = tuple(map(block, range(N_BLOCKS)))


def want(tokens_per_s: float, left_s: float = 60.0, have: int = 0) -> Want:
    """A request of which so many tokens are here."""
    match = Match(have, Reason.UNKNOWN_PREFIX, common_tokens=have)
    return Want(pb.Namespace(), Chain(b"r" * 32, TOKENS), match, Offer(), 0, tokens_per_s, Deadline(left_s))


def chosen(want: Want, bytes_per_s: float, bytes_max: int = 1 << 40) -> int:
    """Tokens of the choice over a link that was measured, 0 for none."""
    link = Link(lambda: 0.0)
    for _ in range(20):
        link.measured(100 << 20, (100 << 20) / bytes_per_s)
        link.measured(0, 1e-3)
    found = options(Reach(0, BLOCKS), want.limit, exact=False)
    choice = choose(want, found, bytes_max, lambda one: link.seconds(one.nbytes))
    return choice.n_tokens if choice is not None else 0


@pytest.mark.parametrize(
    ("bytes_per_s", "tokens_per_s", "is_read"),
    [(1.1e9, 7000, True), (1.1e9, 9500, False), (1.1e8, 700, True), (1.1e8, 950, False), (30e6, 400, False)],
)
def test_a_link_is_used_by_models_that_compute_less_than_half_of_what_it_carries(
    bytes_per_s: float, tokens_per_s: float, is_read: bool
) -> None:
    """Gigabit and ten times that, and one that is throttled to 30 MB/s."""
    assert chosen(want(tokens_per_s), bytes_per_s) == (N_BLOCKS * BLOCK_TOKENS if is_read else 0)


def test_what_does_not_come_in_time_or_has_no_room_is_left_out() -> None:
    """The longest prefix that does."""
    whole_s = N_BLOCKS * BLOCK_BYTES / 1.1e8
    some = chosen(want(100, left_s=whole_s / 2), 1.1e8)
    assert 0.4 * N_BLOCKS * BLOCK_TOKENS < some <= 0.5 * N_BLOCKS * BLOCK_TOKENS
    assert chosen(want(100), 1.1e8, bytes_max=10 * BLOCK_BYTES) == 10 * BLOCK_TOKENS


def test_what_is_here_saves_nothing() -> None:
    """With all but the last block here, that block alone has to be worth all of what it takes."""
    here = want(700, have=(N_BLOCKS - 1) * BLOCK_TOKENS)
    assert chosen(here, 1.1e8) == 0
    assert here.find_s <= FIND_SHARE * (BLOCK_TOKENS + 1) / 700


def test_with_window_layers_only_what_ends_at_a_checkpoint_counts() -> None:
    """With the blocks that it needs, and no others."""
    reach = Reach(0, BLOCKS, (block(9, 40, is_checkpoint=True), block(5, 0, is_checkpoint=True)))
    assert [(one.n_tokens, len(one.objects)) for one in options(reach, 1 << 20, exact=True)] == [
        (5 * BLOCK_TOKENS, 6),
        (9 * BLOCK_TOKENS + 40, 11),
    ]
    assert [one.n_tokens for one in options(reach, 6 * BLOCK_TOKENS, exact=True)] == [5 * BLOCK_TOKENS]
    assert isinstance(next(options(reach, 1 << 20, exact=True)), Choice)
