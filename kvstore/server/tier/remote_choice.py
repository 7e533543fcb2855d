"""Which part of what the remote tier has is worth reading for one request. Pure: nothing here asks or waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from kvstore.core.blocks import BLOCK_TOKENS
from kvstore.core.breaker import Deadline
from kvstore.core.keys import Chain
from kvstore.engine import Match
from kvstore.remote.finder import Reach, RemoteBlock
from kvstore.server.fetching.costs import WORTH_SHARE, Offer
from kvstore.wire.v1 import kvstore_pb2 as pb

# Fewer tokens than this are not asked for: half a block is computed in the time that asking may take.
GAIN_TOKENS_MIN = 128
# The assumed speed of a worker that has not told its own, for a model that was not measured. A worker tells its speed
# with the first prompt that it has computed, and the daemon remembers it.
PREFILL_TOKENS_PER_S = 1000.0
# Finding out what there is may take this share of the prefill that is at stake: so much later is a miss.
FIND_SHARE = 0.05
FIND_S_MAX = 0.5
# Of the time that the caller has, this part is for the tier. The rest is for reading from here what was promoted.
TIME_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class Want:
    """A request of which this store has less than all: what it has (`match`), and what is known of the caller.

    `prefill_tokens_per_s`: the caller's speed, or what is known of it. `deadline`: until when the tier may take.
    """

    identity: pb.Namespace
    chain: Chain
    match: Match
    offer: Offer
    fidelity_min: int
    prefill_tokens_per_s: float
    deadline: Deadline

    @property
    def limit(self) -> int:
        """The most tokens that a fetch gives: all but one."""
        return self.chain.n_tokens - 1

    @property
    def have(self) -> int:
        """Tokens that the caller has without the tier: in its memory, or from here."""
        return max(self.match.n_tokens, self.offer.covered_tokens)

    @property
    def may_gain(self) -> bool:
        """Whether more than half a block is missing here: less is not asked for."""
        return self.limit >= self.have + GAIN_TOKENS_MIN

    @property
    def full(self) -> int:
        """Full blocks of the prompt that are here."""
        return min(self.match.common_tokens // BLOCK_TOKENS, self.chain.full)

    @property
    def before_missing(self) -> bytes:
        """The key of the last full block that is here, after which the tier is asked; the root when there is none."""
        return self.chain.parent(self.full)

    def prefill_s(self, n_tokens: int) -> float:
        """How long the caller would compute for what a prefix of `n_tokens` gives it more than it has."""
        return max(0, n_tokens - self.have) / self.prefill_tokens_per_s

    @property
    def find_s(self) -> float:
        """How long finding out what there is may take."""
        return min(FIND_S_MAX, self.deadline.left_s / 2, FIND_SHARE * self.prefill_s(self.limit))


@dataclass(frozen=True, slots=True)
class Choice:
    """Objects to be read, parents first, and the tokens that are usable once they are here."""

    n_tokens: int
    objects: tuple[RemoteBlock, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all objects."""
        return sum(one.head.nbytes for one in self.objects)


def options(reach: Reach, limit: int, *, exact: bool) -> Iterator[Choice]:
    """Every part that could be read, the shortest first. `exact`: only what ends at a checkpoint is of use."""
    if not exact:
        for count, block in enumerate(reach.blocks, 1):
            yield Choice(min(block.end, limit), reach.blocks[:count])
        return
    for checkpoint in reversed(reach.checkpoints):
        blocks = tuple(one for one in reach.blocks if one.start < checkpoint.end)
        if checkpoint.end <= limit:
            yield Choice(checkpoint.end, (*blocks, checkpoint))


def choose(want: Want, found: Iterable[Choice], bytes_max: int, cost_s: Callable[[Choice], float]) -> Choice | None:
    """The option that saves the most time, None when computing is better than any.

    One is used if it takes at most `WORTH_SHARE` of the prefill that it saves and can be there in time.
    """
    best, best_s = None, 0.0
    for one in found:
        if one.n_tokens < want.have + GAIN_TOKENS_MIN or one.nbytes > bytes_max:
            continue
        saved_s, takes_s = want.prefill_s(one.n_tokens), cost_s(one)
        if takes_s <= min(WORTH_SHARE * saved_s, want.deadline.left_s) and saved_s - takes_s > best_s:
            best, best_s = one, saved_s - takes_s
    return best
