"""Finds the longest stored prefix of a prompt in the index, without reading blobs, and says why it ends there.

Full blocks are found by key, one lookup each, and their token bytes compared. After the last of them the best child is
cut (`kvstore.index.children`). For layouts that need a checkpoint, `longest_exact` looks for the longest position that
has one. `Nearest` looks at what is stored instead of the rest of a prompt.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvstore.core.blocks import BLOCK_TOKENS, FIDELITY_EXACT, TOKEN_BYTES, Reason, count_tokens
from kvstore.core.keys import Chain, NamespaceInfo, block_key
from kvstore.core.records import template_of
from kvstore.core.rules import check_states
from kvstore.engine.evictions import HEAD_TOKENS, HEAD_TOKENS_BYTES
from kvstore.engine.shared import Shared
from kvstore.errors import CorruptDataError
from kvstore.index.children import best_child
from kvstore.index.rows import (
    HEAD_BYTES,
    LEVEL_TOKENS,
    NUMBER_BYTES,
    TOKENS_AT,
    EncodedRow,
    Row,
    Templates,
    fidelity_of,
    kinds_of,
    level_prefix,
    parse_row,
    sizes_of,
)
from kvstore.index.transaction import View

_BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES
# Children of a block among which the newest is looked for.
CHILDREN_MAX = 64


@dataclass(frozen=True, slots=True)
class Slice:
    """The first `take` tokens of a stored block."""

    row: Row
    take: int


@dataclass(frozen=True)
class Match:
    """The longest usable prefix: its blocks in order, and why there is no more.

    Of an exact match also the checkpoint at its end, if there is one. `diverged`: what is stored goes on after it,
    differently from what was asked for (`Engine.mark_divergence`). The rows are parsed when somebody looks into them,
    which may raise what `parse_row` does. `common_tokens`: how many tokens the prompt shares with the nearest stored
    chain, whether they can be used or not, and `nearest` is the key of the block in which they end.
    """

    n_tokens: int
    reason: Reason
    rows: tuple[EncodedRow, ...] = ()
    checkpoint: Row | None = None
    diverged: bool = False
    templates: Templates = field(default_factory=dict, repr=False)
    common_tokens: int = 0
    nearest: bytes = b""

    @functools.cached_property
    def slices(self) -> tuple[Slice, ...]:
        """The blocks in order."""
        return tuple([Slice(parse_row(key, value, self.templates), take) for key, value, take in self.rows])

    @functools.cached_property
    def fidelity(self) -> int:
        """The least rank among blocks and checkpoint."""
        own = FIDELITY_EXACT if self.checkpoint is None else self.checkpoint.fidelity
        return min([own, *(fidelity for fidelity, _ in self._kinds)])

    @property
    def templates_digests(self) -> set[int]:
        """The digests of the templates of its blocks, read without parsing the rows; 0 stands for none."""
        return {digest for _, digest in self._kinds}

    @functools.cached_property
    def _kinds(self) -> set[tuple[int, int]]:
        return kinds_of(self.rows)

    @functools.cached_property
    def sizes(self) -> list[tuple[int, int, int]]:
        """Of each block (bytes of its payload, digest of its templates, tokens to take), without parsing the rows."""
        return sizes_of(self.rows)

    @functools.cached_property
    def one_of_each(self) -> dict[int, Row]:
        """One row for each digest of templates: rows with one digest name the same templates."""
        some = {digest: taken for taken, (_, digest, _) in zip(self.rows, self.sizes, strict=True)}
        return {digest: parse_row(key, value, self.templates) for digest, (key, value, _) in some.items()}

    def needed_templates(self) -> dict[bytes, bytes]:
        """The templates that its runs name, by id."""
        used = [template_of(run) for row in self.one_of_each.values() for run in row.block.runs]
        return {template.id: template.record for template in used}

    @property
    def parts(self) -> tuple[Slice, ...]:
        """Everything to be read: the slices, and, as one more, the checkpoint."""
        row = self.checkpoint
        return self.slices if row is None else (*self.slices, Slice(row, row.n_tokens))


@dataclass(frozen=True, slots=True)
class Found:
    """The longest stored prefix: index rows, not yet parsed, with the tokens to take of each.

    The first `full` tokens come from full blocks. `better`: the prefix would be longer if a block of lower fidelity
    were allowed.
    """

    rows: tuple[EncodedRow, ...]
    n_tokens: int
    full: int
    better: bool


def longest_prefix(view: View, chain: Chain, limit_tokens: int, fidelity_min: int) -> Found:
    """The longest stored prefix of the first `limit_tokens` whose blocks are all of `fidelity_min` or more."""
    tokens = chain.tokens
    end = min(len(tokens), limit_tokens * TOKEN_BYTES)
    look_up = view.stored if view.ring.key(chain.root) is None else view.value
    rows = chain.stored(end // _BLOCK_BYTES, look_up, TOKENS_AT)
    if fidelity_min:
        rows = list(itertools.takewhile(lambda row: fidelity_of(row[1]) >= fidelity_min, rows))
    at, parent = len(rows) * _BLOCK_BYTES, chain.parent(len(rows))
    best, take, low_take = best_child(view, chain.root, parent, tokens[at : min(end, at + _BLOCK_BYTES)], fidelity_min)
    if best is not None:
        rows.append((best.key, best.value, take))
    full = at // TOKEN_BYTES
    return Found(tuple(rows), full + take, full, low_take > take)


@dataclass(frozen=True, slots=True)
class Exact:
    """A prefix cut to the position of its last checkpoint, with rows as in `Found`.

    `better`: a checkpoint of too low fidelity would have given more. `diverged`: what is stored goes on after the
    checkpoint, differently from the query.
    """

    rows: tuple[EncodedRow, ...]
    checkpoint: Row | None
    better: bool
    diverged: bool


def longest_exact(view: View, chain: Chain, found: Found, fidelity_min: int) -> Exact:
    """The longest position with a checkpoint of `fidelity_min` or more among those that `found` covers."""
    better = False
    for level in range(found.full // BLOCK_TOKENS, -1, -1):
        parent = chain.parent(level)
        # At the end of a full block the checkpoint is one level deeper, with no tokens of its own.
        covered = min(found.n_tokens - level * BLOCK_TOKENS, BLOCK_TOKENS - 1)
        start = level * _BLOCK_BYTES
        for row in view.checkpoints(parent, chain.tokens[start : start + covered * TOKEN_BYTES]):
            if row.fidelity < fidelity_min:
                better = True
                continue
            rows = _cut(found.rows, row.end)
            return Exact(rows, row, better, found.n_tokens > row.end or _goes_on(view, rows))
    return Exact((), None, better, False)


def _cut(rows: tuple[EncodedRow, ...], end: int) -> tuple[EncodedRow, ...]:
    """Rows with the tokens to take of each, no further than position `end`. All but the last are full blocks."""
    starts = range(0, end, BLOCK_TOKENS)
    return tuple((key, value, min(take, end - start)) for start, (key, value, take) in zip(starts, rows, strict=False))


def _goes_on(view: View, rows: tuple[EncodedRow, ...]) -> bool:
    """Whether more is stored after exactly these rows: the rest of the last one, or what follows it."""
    key, value, take = rows[-1]
    row = parse_row(key, value, view.templates)
    if take < row.n_tokens or take < BLOCK_TOKENS:
        return take < row.n_tokens
    here = (child for key in view.children(row.key) if (child := view.row(key)) is not None)
    return any(not child.is_checkpoint or child.n_tokens for child in itertools.islice(here, 2))


def _why(shared: Shared, found: Found, chain: Chain, limit: int) -> Reason:
    """The reason why a match is not longer."""
    if found.n_tokens >= limit:
        return Reason.OK
    if found.better:
        return Reason.FIDELITY
    return gone_reason(shared, chain, found.n_tokens, limit) or Reason.UNKNOWN_PREFIX


def gone_reason(shared: Shared, chain: Chain, n_tokens: int, limit: int) -> Reason | None:
    """Why what a prompt had after its first `n_tokens`, which are stored, is gone; None if that is not remembered."""
    full = n_tokens // BLOCK_TOKENS
    rest = chain.tokens[full * _BLOCK_BYTES : min(limit, (full + 1) * BLOCK_TOKENS) * TOKEN_BYTES]
    heads = [rest] if n_tokens - full * BLOCK_TOKENS >= HEAD_TOKENS else [rest, rest[:HEAD_TOKENS_BYTES]]
    reasons = (shared.lost.why(block_key(chain.parent(full), head)) for head in heads)
    return next((reason for reason in reasons if reason is not None), None)


class Matcher:
    """Matches of one engine. Any thread may call; takes no lock but LMDB's read transaction."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    def match(self, chain: Chain, fidelity_min: int = 0, limit_tokens: int | None = None, exact: bool = False) -> Match:
        """The longest stored prefix of a prompt, at most `limit_tokens`, of blocks of `fidelity_min` or more.

        `exact`: the longest that ends at a checkpoint, likewise of `fidelity_min`; NO_CHECKPOINT when there are blocks
        for more. Plans from the index alone. CorruptDataError when the index is damaged: a miss.
        """
        shared = self._shared
        root = chain.root
        limit = chain.n_tokens if limit_tokens is None else max(0, min(limit_tokens, chain.n_tokens))
        if not shared.index.is_there:
            return Match(0, Reason.UNAVAILABLE)
        if limit and root not in shared.namespaces:
            why = _why(shared, Found((), 0, 0, False), chain, limit)
            return Match(0, Reason.IDENTITY if why is Reason.UNKNOWN_PREFIX else why)
        if shared.is_key_missing(root):
            return Match(0, Reason.KEY_MISSING)
        shared.uses.name(root)
        with shared.index.view() as view:
            found = longest_prefix(view, chain, limit, fidelity_min)
            cut = longest_exact(view, chain, found, fidelity_min) if exact and found.n_tokens else None
            templates = view.templates
        nearest = found.rows[-1][0] if found.rows else b""
        cut = cut or Exact(found.rows, None, better=False, diverged=False)
        end = found.n_tokens
        if exact:
            end = 0 if cut.checkpoint is None else cut.checkpoint.end
        if end < found.n_tokens:
            why = Reason.FIDELITY if cut.better else Reason.NO_CHECKPOINT
        else:
            why = _why(shared, found, chain, limit)
        is_fork = cut.diverged and end < limit
        return Match(end, why, cut.rows, cut.checkpoint, is_fork, templates, found.n_tokens, nearest)

    def checkpoint_at(self, chain: Chain) -> Row | None:
        """The checkpoint after exactly the last token. Whether there are blocks up to it, a match says."""
        with self._shared.index.view() as view:
            found = next(view.checkpoints(chain.parent(chain.full), chain.tail), None)
        return found if found is not None and found.tokens == chain.tail else None

    def first_unusable(self, slices: Sequence[Slice]) -> int | None:
        """Index of the first slice whose blob is gone, has another size than its row says, or breaks a rule.

        Everything else that a fetch takes is verified with the checksums of the row, by the reader of the bytes.
        """
        for number, part in enumerate(slices):
            row = part.row
            if self._shared.blobs.size(row.blob) != row.blob_bytes:
                return number
            if row.is_checkpoint and (info := self._shared.namespaces.get(row.root)) is not None:
                try:
                    check_states(info.layout, row.block.states, row.block.end)
                except CorruptDataError:
                    return number
        return None


class Nearest:
    """Looks at what is stored next to a prompt, to explain a miss: where they part, and what stands there instead.

    Nothing here counts as a use, takes a lease or reads a blob. Any thread may call; one read transaction each.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.is_encrypted = shared.is_encrypted

    def common_tokens(self, chain: Chain, limit_tokens: int) -> int:
        """How many of the first `limit_tokens` of a prompt are stored, at any fidelity; 0 for fewer than LEVEL_TOKENS.

        Most prompts share nothing with most namespaces, and one lookup tells that. Not for encrypted namespaces.
        """
        with self._shared.index.view() as view:
            head = level_prefix(chain.root, chain.tokens, 1, None)
            if limit_tokens < LEVEL_TOKENS or next(view.entries(head), None) is None:
                return 0
            return longest_prefix(view, chain, limit_tokens, 0).n_tokens

    def after(self, root: bytes, key: bytes, n_tokens: int, limit_tokens: int) -> bytes:
        """Tokens of the stored chain after its first `n_tokens`, which end in block `key`; of none: after the root.

        Empty at the end of the chain, and when the block is gone. Where several chains go on, the newest.
        """
        with self._shared.index.view() as view:
            if not key:
                return _descend(view, root, b"", limit_tokens)
            row = view.row(key)
            if row is None:
                return b""
            rest = row.tokens[(n_tokens - row.start) * TOKEN_BYTES :]
            return _descend(view, key if row.n_tokens == BLOCK_TOKENS else b"", rest, limit_tokens)

    def upto(self, key: bytes, n_tokens: int) -> bytes:
        """The first `n_tokens` of the chain that block `key` belongs to; empty when any of it is gone."""
        pieces: list[bytes] = []
        with self._shared.index.view() as view:
            row = view.row(key)
            while row is not None:
                pieces.append(row.tokens)
                if not row.start:
                    return b"".join(reversed(pieces))[: n_tokens * TOKEN_BYTES]
                row = view.row(row.parent)
        return b""

    def follow(self, root: bytes, parent: bytes, head: bytes, limit_tokens: int) -> bytes:
        """Tokens of the stored chain that goes on with `head` after block `parent`, after it; empty without one."""
        with self._shared.index.view() as view:
            block, rest = head[: BLOCK_TOKENS * TOKEN_BYTES], head[BLOCK_TOKENS * TOKEN_BYTES :]
            row, take, _ = best_child(view, root, parent, block, 0)
            if row is None or take < count_tokens(block):
                return b""
            after = _descend(view, row.key if row.n_tokens == BLOCK_TOKENS else b"", row.tokens[len(block) :], 1 << 10)
            return after[len(rest) :][: limit_tokens * TOKEN_BYTES] if after.startswith(rest) else b""

    # -- what was deleted meanwhile ---------------------------------------------------------------------------------

    @property
    def since(self) -> tuple[int, int]:
        """The numbers of the last eviction of a namespace and of the last deletion of blocks."""
        return self._shared.evictions.number, self._shared.lost.number

    def is_gone(self, root: bytes, keys: Iterable[bytes], since: tuple[int, int]) -> bool:
        """Whether a namespace, or one of the blocks with these keys or heads, was deleted after `since`."""
        with self._shared.lock:
            evicted = self._shared.evictions.covers(root, since[0])
        return evicted or self._shared.lost.any_since(keys, since[1])

    def head_key(self, parent: bytes, tokens: bytes) -> bytes:
        """The key under which the deletion of any block that begins so after `parent` is remembered."""
        return block_key(parent, tokens[:HEAD_TOKENS_BYTES])

    # -- namespaces -------------------------------------------------------------------------------------------------

    def namespaces(self, count: int, *, readable: bool) -> list[NamespaceInfo]:
        """Up to `count` namespaces that are neither encrypted nor a tenant's, or that are, the last named first."""
        shared = self._shared
        with shared.lock:
            used = [(shared.used_s(root), root) for root in shared.index.spaces]
            infos = [shared.namespaces[root] for _, root in sorted(used, reverse=True) if root in shared.namespaces]
        return list(itertools.islice((info for info in infos if self.is_readable(info) is readable), count))

    def is_readable(self, info: NamespaceInfo) -> bool:
        """Whether the tokens of a namespace may be shown to an admin: not a tenant's, nor what is encrypted."""
        return not (info.is_salted or self.is_encrypted(info.root))


def _descend(view: View, parent: bytes, rest: bytes, limit_tokens: int) -> bytes:
    """`rest`, then the tokens of the newest chain after block `parent`, `limit_tokens` of them in all."""
    while parent and count_tokens(rest) < limit_tokens:
        row = _newest(view, parent)
        if row is None:
            break
        rest += row.tokens
        parent = row.key if row.n_tokens == BLOCK_TOKENS else b""
    return rest[: limit_tokens * TOKEN_BYTES]


def _newest(view: View, parent: bytes) -> Row | None:
    """The newest block after `parent`, by the number at the end of its entry: no other row is parsed."""
    entries = itertools.islice(view.entries(parent + bytes(1 + HEAD_BYTES)), CHILDREN_MAX)
    newest = max(((entry[-NUMBER_BYTES:], key) for entry, key in entries), default=None)
    return None if newest is None else view.row(newest[1])
