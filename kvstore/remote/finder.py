"""Finds how much of a prompt the remote store holds, without an index: by asking for names that follow from keys.

Full blocks take at most three round trips, each a batch of HEADs:

    1  the blocks at depths 1, 2, 4, 8 .. and the last one
    2  32 blocks spread evenly over the gap between the last one that was found and the first one that was not, and all
       blocks before the gap that were not asked for yet
    3  the rest up to the first one that was not found

Every block of the answer was seen: presence is not monotone, since others evict and pushes are dropped. A hole ends the
prefix. One listing below the last block finds tails and checkpoints, whose keys are computed from the prompt for every
length and compared with the names. What was not there is not asked for again for `ABSENT_S`. What was there is asked
for again by every prompt: a remembered presence would be a false hit when the object has gone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvstore.core.blocks import BLOCK_TOKENS, TOKEN_BYTES, count_tokens
from kvstore.core.bounded import Bounded
from kvstore.core.breaker import Deadline
from kvstore.core.keys import BLOCK_BYTES, Chain, block_key, checkpoint_key
from kvstore.errors import DeadlineError, RemoteError
from kvstore.remote.object_names import Naming, parse_object_name
from kvstore.remote.object_store import PAGE_NAMES_MAX, Head, Listed, ObjectStore

ABSENT_S = 60.0
ABSENCES_MAX = 65_536
# Wrong objects that are remembered; others are found to be wrong again.
WRONG_MAX = 4096
ARY = 32
# Of a prompt that needs a checkpoint and has none below its last block: blocks before it that are listed, too.
LISTED_BACK_MAX = 4
# Children of the last common block, other than the prompt's own, whose headers are read for common tokens.
OTHERS_MAX = 4
# Pages of one listing that are asked for: a system prompt may have thousands of continuations.
LISTED_PAGES_MAX = 4
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RemoteBlock:
    """An object that was seen, and the block that it must hold. `start`: position of its first token.

    `shared`: how many of its first tokens the prompt has, where it then goes on differently; None: all of them.
    """

    name: str
    head: Head
    label: str
    root: bytes
    parent: bytes
    key: bytes
    tokens: bytes
    start: int
    is_checkpoint: bool = False
    shared: int | None = None

    @property
    def end(self) -> int:
        """Position after its last token that the prompt has."""
        return self.start + (count_tokens(self.tokens) if self.shared is None else self.shared)


@dataclass(frozen=True, slots=True)
class Reach:
    """What the remote store holds of a prompt after its first `first` full blocks, at one moment.

    `blocks`: consecutive full blocks, then perhaps a tail. `checkpoints`: of positions that these blocks reach, the
    longest first. `others`: children of the last full block that are none of the prompt's own, at most OTHERS_MAX, the
    newest first: some of their tokens may be the prompt's, which their names do not say.
    """

    first: int
    blocks: tuple[RemoteBlock, ...] = ()
    checkpoints: tuple[RemoteBlock, ...] = ()
    others: tuple[Listed, ...] = ()

    @property
    def full(self) -> int:
        """Full blocks of the prompt after which the others come."""
        found = sum(count_tokens(one.tokens) == BLOCK_TOKENS for one in self.blocks)
        return self.first + found

    @property
    def n_tokens(self) -> int:
        """Tokens of the prompt that blocks cover, with those before the first."""
        return self.blocks[-1].end if self.blocks else self.first * BLOCK_TOKENS


class Absences:
    """Names that were not there a short while ago: at most `count_max`, the oldest forgotten first. Any thread."""

    def __init__(
        self, absent_s: float = ABSENT_S, count_max: int = ABSENCES_MAX, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._absent_s, self._clock = absent_s, clock
        self._until_s: Bounded[str, float] = Bounded(count_max)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._until_s)

    def note(self, names: Iterable[str]) -> None:
        """They were not there just now."""
        until_s = self._clock() + self._absent_s
        with self._lock:
            for name in names:
                self._until_s[name] = until_s

    def forget(self, names: Iterable[str]) -> None:
        """They were written just now."""
        with self._lock:
            for name in names:
                self._until_s.pop(name, None)

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Those that are worth asking for."""
        now_s = self._clock()
        with self._lock:
            return [name for name in names if self._until_s.get(name, 0.0) <= now_s]


class Finder:
    """See the module. Any thread may call; a call takes a thread for its round trips."""

    def __init__(self, store: ObjectStore, absences: Absences | None = None) -> None:
        self._store = store
        self.absences = Absences() if absences is None else absences
        self._wrong: Bounded[str, str] = Bounded(WRONG_MAX)  # ETags by name
        self._lock = threading.Lock()
        self.wrong = 0

    def report_wrong(self, block: RemoteBlock, why: Exception) -> None:
        """Pass an object over from now on: it is not what its name promises. It is not ours, so it is not deleted."""
        with self._lock:
            known = self._wrong.get(block.name) == block.head.etag
            self._wrong[block.name] = block.head.etag
            self.wrong += not known
        if not known:
            log.warning("an object of %s is wrong and is passed over: %s: %s", self._store.place, block.name, why)

    def _is_wrong(self, name: str, head: Head) -> bool:
        return self._wrong.get(name) == head.etag

    def find(
        self,
        chain: Chain,
        naming: Naming,
        labels: Sequence[str],
        deadline: Deadline,
        *,
        first: int = 0,
        needs_checkpoint: bool = False,
    ) -> Reach:
        """What there is of a prompt after its first `first` full blocks, under the first of `labels` that is there.

        Cut the chain (`Chain.head`) to what may be restored. With `needs_checkpoint` a few more listings are made when
        there is none below the last block. DeadlineError, RemoteError when the store does not answer.
        """
        known = self._full_blocks(chain, naming, labels, deadline, first)
        blocks: list[RemoteBlock] = []
        for depth in range(first, chain.full):
            found = known.get(depth)
            if found is None:
                break
            blocks.append(found)
        full = first + len(blocks)
        tail, marks, others = self._children(chain, naming, labels, deadline, full)
        if tail is not None:
            blocks.append(tail)
        reached = blocks[-1].end if blocks else full * BLOCK_TOKENS
        checkpoints = [one for one in marks if one.end <= reached]
        for depth in range(full - 1, max(full - 1 - LISTED_BACK_MAX, first, 0), -1):
            if checkpoints or not needs_checkpoint:
                break
            checkpoints = self._children(chain, naming, labels, deadline, depth)[1]
        return Reach(first, tuple(blocks), tuple(checkpoints), tuple(others))

    def _full_blocks(
        self, chain: Chain, naming: Naming, labels: Sequence[str], deadline: Deadline, first: int
    ) -> dict[int, RemoteBlock | None]:
        known: dict[int, RemoteBlock | None] = {}

        def ask(depths: Iterable[int]) -> int:
            """Ask for blocks that are not known yet; the first depth that is missing."""
            wanted = [depth for depth in depths if depth not in known]
            names = {d: [naming.name(chain.parent(d), chain.key(d), label) for label in labels] for d in wanted}
            heads = self._heads([name for depth in wanted for name in names[depth]], deadline)
            for depth in wanted:
                there = ((name, label) for name, label in zip(names[depth], labels, strict=True) if name in heads)
                name, label = next(there, ("", ""))
                known[depth] = _full_block(chain, depth, name, heads[name], label) if name else None
            return min((depth for depth, found in known.items() if found is None), default=chain.full)

        if first >= chain.full:
            return known
        steps = (first + (1 << power) - 1 for power in range((chain.full - first).bit_length()))
        missing = ask([*(depth for depth in steps if depth < chain.full), chain.full - 1])
        reached = max((depth for depth in known if depth < missing), default=first - 1)
        gap = missing - reached - 1
        if gap > ARY:
            spread = (reached + 1 + gap * step // (ARY + 1) for step in range(1, ARY + 1))
            missing = ask([*range(first, reached), *spread])
        ask(range(first, missing))
        return known

    def _heads(self, names: list[str], deadline: Deadline) -> dict[str, Head]:
        asked = self.absences.unknown(names)
        if not asked:
            return {}
        heads = self._store.head(asked, deadline)
        self.absences.note(name for name, head in zip(asked, heads, strict=True) if head is None)
        there = {name: head for name, head in zip(asked, heads, strict=True) if head is not None}
        return {name: head for name, head in there.items() if not self._is_wrong(name, head)}

    def _children(
        self, chain: Chain, naming: Naming, labels: Sequence[str], deadline: Deadline, depth: int
    ) -> tuple[RemoteBlock | None, list[RemoteBlock], list[Listed]]:
        """Of the prompt after its first `depth` full blocks: (the longest tail, all checkpoints, the longest first,
        objects that may be of prompts which go on differently).

        Nothing is listed at the start of a namespace: all of its prompts begin there, and less than a block is not
        worth it. Tails and checkpoints are of this prompt to their last token.
        """
        parent = chain.parent(depth)
        prefix = naming.children(parent)
        if not depth or not self.absences.unknown([prefix]):
            return None, [], []
        listed = self._listed(prefix, deadline)
        if not listed:
            self.absences.note([prefix])
            return None, [], []
        by_key: dict[str, dict[str, Listed]] = {}
        for one in listed:
            parts = parse_object_name(one.name)
            if parts is not None and parts.label in labels and not self._is_wrong(one.name, one.head):
                by_key.setdefault(parts.key, {})[parts.label] = one
        rest = chain.tokens[depth * BLOCK_BYTES :][: BLOCK_BYTES - TOKEN_BYTES]
        tails: list[RemoteBlock] = []
        checkpoints: list[RemoteBlock] = []
        for end in range(len(rest), -1, -TOKEN_BYTES):
            tokens = rest[:end]
            for kind, made in ((block_key, tails), (checkpoint_key, checkpoints)):
                key = kind(parent, tokens)
                under = by_key.get(naming.hexed(key), {})
                label = next((label for label in labels if label in under), None)
                if label is not None and (end or kind is checkpoint_key):
                    found, start = under[label], depth * BLOCK_TOKENS
                    is_checkpoint = kind is checkpoint_key
                    made.append(
                        RemoteBlock(
                            found.name, found.head, label, chain.root, parent, key, tokens, start, is_checkpoint
                        )
                    )
        ours = {naming.hexed(one.key) for one in (*tails, *checkpoints)}
        best = [
            next(under[label] for label in labels if label in under) for key, under in by_key.items() if key not in ours
        ]
        others = sorted(best, key=lambda one: -one.modified_s)[:OTHERS_MAX]
        return (tails[0] if tails else None), checkpoints, others

    def _listed(self, prefix: str, deadline: Deadline) -> list[Listed]:
        """Up to LISTED_PAGES_MAX pages of what is there. What comes late or not at all after the first is left out."""
        listed = page = self._store.names(prefix, "", deadline)
        for _ in range(LISTED_PAGES_MAX - 1):
            if len(page) < PAGE_NAMES_MAX:
                break
            try:
                page = self._store.names(prefix, page[-1].name, deadline)
            except (RemoteError, DeadlineError) as error:
                log.info("a listing of the remote store ends early: %s", error)
                break
            listed = listed + page
        return listed


def _full_block(chain: Chain, depth: int, name: str, head: Head, label: str) -> RemoteBlock:
    tokens = chain.tokens[depth * BLOCK_BYTES : (depth + 1) * BLOCK_BYTES]
    return RemoteBlock(
        name, head, label, chain.root, chain.parent(depth), chain.key(depth), tokens, depth * BLOCK_TOKENS
    )
