"""What goes and what stays: the policies that choose blobs to evict, and which checkpoints a chain keeps.

Policies are functions from the rows of `kvstore.index.table` to scores. The blob with the lowest score is evicted
first, but never a parent before its children, so that every blob stays reachable from its root.

A checkpoint is worth the tokens that it saves, divided by its bytes. A prompt that ends after it starts from it instead
of the checkpoint before it, so of a chain the last one and those where prompts diverge are worth most. The others have
one continuation and nothing else. The commit that adds a checkpoint removes those of its chain that hardly save
anything (`redundant`), whatever room there is; eviction takes what is left of them earlier than its last use says
(`by_last_use`). The chain of a checkpoint is every checkpoint whose tokens are a prefix of its own, and itself.

Threads: use a `Table.snapshot`, without a lock. What looks at the rows of a few keys holds the engine's lock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvstore.core.blocks import BLOCK_TOKENS
from kvstore.index.rows import Row
from kvstore.index.table import AUX, CHECKPOINT, INTERIM, LIVE, PINNED, Rows, Table
from kvstore.index.transaction import Edit, View

# Blobs removed in one commit: bounds the transaction, and how long the engine's lock is held.
VICTIMS_MAX = 1024
NO_LIMIT = 1 << 62
Mask: TypeAlias = npt.NDArray[np.bool_]
# A prompt uses a checkpoint that another one passed only when its history was edited, and then once.
_PASSED_AGING = 8


def by_last_use(rows: Rows) -> npt.NDArray[Any]:
    """The number of the last use. A passed checkpoint ages _PASSED_AGING times as fast, divided by its worth.

    It does not simply go first: in a store that is always full, no history could be stripped or edited and still hit.
    """
    scores: npt.NDArray[Any] = rows["last_use"]
    passed, worth = passed_checkpoints(rows)
    if len(passed):
        scores, now = scores.copy(), int(scores.max())
        scores[passed] = now - (now - scores[passed]) * _PASSED_AGING / worth
    return scores


# Scores by which blobs go, lowest first.
POLICIES: dict[str, Callable[[Rows], npt.NDArray[Any]]] = {
    "lru": by_last_use,
}


def where(
    table: Table,
    *,
    namespaces: Collection[int] | None = None,
    unused_since_s: int | None = None,
    aux: bool = False,
) -> Mask:
    """A selection of blobs; conditions are ANDed."""
    rows = table.rows
    mask: Mask = (rows["flags"] & LIVE) != 0
    if namespaces is not None:
        mask &= np.isin(rows["namespace"], list(namespaces))
    if unused_since_s is not None:
        mask &= rows["used_s"] <= max(0, unused_since_s)
    if aux:
        mask &= (rows["flags"] & AUX) != 0
    return mask


def tree(table: Table, tops: Iterable[bytes]) -> Mask:
    """A selection of these blobs and everything after them."""
    rows, mask = table.rows, np.zeros(len(table.rows), np.bool_)
    mask[table.slots(tops)] = True
    for level in levels(rows, where(table)):
        mask[level] |= mask[rows["parent"][level]]
    return mask


def levels(rows: Rows, mask: Mask) -> Iterator[npt.NDArray[np.intp]]:
    """Those of a selection that have a parent: numbers of rows of one depth at a time, the shallowest first."""
    linked = np.flatnonzero(mask & (rows["parent"] >= 0))
    linked = linked[np.argsort(rows["depth"][linked], kind="stable")]
    yield from np.split(linked, np.flatnonzero(np.diff(rows["depth"][linked])) + 1)


def reachable_bytes(table: Table, keep: Iterable[bytes] = (), mask: Mask | None = None) -> int:
    """What eviction could free at most: everything selected but `keep`, what is pinned, and their ancestors."""
    return int(table.rows["nbytes"][evictable(table, keep, mask)].sum())


def victims(
    table: Table,
    need_bytes: int,
    keep: Iterable[bytes] = (),
    mask: Mask | None = None,
    policy: str = "lru",
    count_max: int = VICTIMS_MAX,
) -> list[bytes]:
    """Keys to remove next, children before parents, until `need_bytes` are freed or `count_max` are named.

    Leaves with the lowest score first; a parent follows once all its children are named, no earlier than they.
    """
    rows, free = table.rows, evictable(table, keep, mask)
    leaves = np.flatnonzero(free & (rows["children"] == 0))
    score_of = POLICIES[policy](rows)
    scores = score_of[leaves]
    if len(leaves) > count_max:
        # No other leaf can be among the first `count_max`; ties at the end are as good as each other.
        lowest = np.argpartition(scores, count_max - 1)[:count_max]
        leaves, scores = leaves[lowest], scores[lowest]
    depths = rows["depth"][leaves]
    heap = list(zip(scores.tolist(), (-depths.astype(np.int64)).tolist(), leaves.tolist(), strict=True))
    heapq.heapify(heap)
    children: dict[int, int] = {}
    named: list[int] = []
    freed = 0
    while heap and freed < need_bytes and len(named) < count_max:
        score, _, slot = heapq.heappop(heap)
        named.append(slot)
        freed += int(rows["nbytes"][slot])
        above = int(rows["parent"][slot])
        if above < 0:
            continue
        children[above] = children.get(above, int(rows["children"][above])) - 1
        if not children[above] and free[above]:
            heapq.heappush(heap, (max(score, score_of[above].item()), -int(rows["depth"][above]), above))
    return table.keys(named)


def pinned_bytes(table: Table, mask: Mask | None = None) -> int:
    """What pinned blobs and their ancestors cost on disk; with a selection, those of it."""
    kept = _kept(table, ())
    return int(table.rows["nbytes"][kept if mask is None else kept & mask].sum())


def evictable(table: Table, keep: Iterable[bytes], mask: Mask | None) -> Mask:
    """What is selected, without `keep`, what is pinned, the ancestors of both, and aux blocks that are referred to."""
    referred: Mask = ((table.rows["flags"] & AUX) != 0) & (table.rows["children"] > 0)
    free: Mask = (where(table) if mask is None else mask) & ~_kept(table, keep) & ~referred
    return free


def _kept(table: Table, keep: Iterable[bytes]) -> Mask:
    rows = table.rows
    kept: Mask = (rows["flags"] & PINNED) != 0
    for start in [*np.flatnonzero(kept).tolist(), *table.slots(keep)]:
        slot = start
        while slot >= 0 and (slot == start or not kept[slot]):
            kept[slot] = True
            slot = int(rows["parent"][slot])
    return kept


def remove_rows(edit: Edit, keys: Sequence[bytes], keep: Collection[bytes] = ()) -> tuple[list[Row], list[Row]]:
    """Remove the rows of keys that were chosen, children before parents: (they, the aux rows that went with them).

    What has changed since stays: a blob that has children by now, that is pinned, or that is in `keep`.
    """
    rows, before, table = list[Row](), len(edit.released), edit.table
    for key in keys:
        is_free = key not in keep and not table.value(key, "children") and not table.value(key, "flags") & PINNED
        if is_free and (row := edit.row(key)) is not None:
            edit.remove(row)
            rows.append(row)
    return rows, edit.released[before:]


def leads_to(table: Table, key: bytes, others: Iterable[bytes]) -> bool:
    """Whether a blob is one of others, or one of them comes after it."""
    rows, (slot, *_), seen = table.rows, (*table.slots([key]), -1), set[int]()
    depth = rows["depth"][slot]
    for start in table.slots(others):
        at = start
        while at >= 0 and at not in seen and rows["depth"][at] >= depth:
            if at == slot:
                return True
            seen.add(at)
            at = int(rows["parent"][at])
    return False


def released_bytes(table: Table, keys: Iterable[bytes]) -> int:
    """What aux blocks cost that go with these blobs: those of namespaces of which no other blob stays."""
    rows, going = table.rows, np.zeros(len(table.rows), np.bool_)
    going[table.slots(keys)] = True
    aux = ((rows["flags"] & AUX) != 0) & ~going
    staying = np.unique(rows["namespace"][where(table) & ~aux & ~going])
    return int(rows["nbytes"][aux & (rows["children"] > 0) & ~np.isin(rows["namespace"], staying)].sum())


# -- checkpoints --------------------------------------------------------------------------------------------------

# Of the places where prompts were seen to diverge once, those that a chain keeps: the last ones. An agent whose
# thinking is stripped from its history diverges once a turn, and never there again.
_FORKS = 3
# Prompts that diverged at a place so often make it one that is kept.
_FORK_HITS = 2
# Without a checkpoint a prompt may have to prefill at most this many times what it must. That keeps at most 8
# checkpoints of an agent's 30 calls, and 14 of 1,000; 2 times would keep 10 and 20.
_TIMES_MAX = 3.0
# One that saves at least 1/_PARTS of the chain stays, as the end of a user's message after a long round of calls does.
# There are never more than _PARTS of them.
_PARTS = 6
# To prefill a token or a few takes equally long, so checkpoints that are closer than this hardly add anything.
_FEW_TOKENS = 256
# A checkpoint that saves nothing still has an age.
_WORTH_MIN = 1 / 128


def redundant(rows: Rows, ends: Sequence[int]) -> list[int]:
    """Which of a chain are to go: places in `rows`, whose checkpoints end at these positions, in ascending order.

    The first and the last two stay, and those where prompts diverge, and what is pinned. The last two: a prompt of an
    agent continues from the last one, or, when its thinking is stripped, from the one before it. Interim checkpoints
    go when there is one after them. Of the others those stay that save a large part of the chain, and some at growing
    distances from the end.
    """
    marks, pinned = rows["mark"], (rows["flags"] & PINNED) != 0
    passed = ((rows["flags"] & INTERIM) != 0) & (marks == 0) & ~pinned
    passed[-1] = False
    left = np.flatnonzero(~passed).tolist()
    stays = pinned | ((marks > 0) & (rows["hits"] >= _FORK_HITS))
    latest = [at for at in sorted(left, key=lambda at: -marks[at]) if marks[at] and at != left[-1]]
    stays[[left[0], *left[-2:], *latest[:_FORKS]]] = True
    while True:
        positions = [ends[at] for at in left]
        times = {at: _times(positions, at) for at in range(1, len(left) - 1) if not stays[left[at]]}
        little = [at for at in times if (positions[at] - positions[at - 1]) * _PARTS < positions[-1]]
        least = min(little, key=times.__getitem__, default=0)
        if not little or times[least] > _TIMES_MAX:
            break
        del left[least]
    return sorted(set(range(len(ends))) - set(left))


def _times(positions: Sequence[int], at: int) -> float:
    """How many times what it must a prompt would prefill at worst without the checkpoint `at`."""
    end = positions[-1] + _FEW_TOKENS
    return (end - positions[at - 1]) / (end - positions[at + 1])


def passed_checkpoints(rows: Rows) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Row numbers of the checkpoints that have one continuation, with another one on it, and what each is worth.

    Worth is in tokens saved for a byte, compared with the block before it, at most 1. The table has no tokens, so a
    checkpoint within a block counts as one on the way to everything after that block.
    """
    live, flags, parent = (rows["flags"] & LIVE) != 0, rows["flags"], rows["parent"]
    all_ = np.flatnonzero(live & ((flags & CHECKPOINT) != 0) & (parent >= 0))
    if not len(all_):
        return all_, np.empty(0)
    all_ = all_[np.lexsort((rows["n_tokens"][all_], parent[all_]))]
    above = parent[all_]
    # The depth of a checkpoint is one more than that of a block in its place.
    ends = (rows["depth"][all_].astype(np.int64) - 1) * BLOCK_TOKENS + rows["n_tokens"][all_]
    furthest = np.zeros(len(rows), np.int64)
    np.maximum.at(furthest, above, ends)
    blocks = list(levels(rows, live & ((flags & CHECKPOINT) == 0)))
    before, is_below, next_blocks = np.zeros_like(furthest), np.zeros(len(rows), np.bool_), np.zeros_like(furthest)
    for level in blocks:
        before[level] = np.maximum(before[parent[level]], furthest[parent[level]])
        np.add.at(next_blocks, parent[level], 1)
    for level in reversed(blocks):
        is_below[parent[level[is_below[level] | (furthest[level] > 0)]]] = True
    is_same = above[1:] == above[:-1]
    is_last_there = ~np.append(is_same, False)
    previous = np.where(np.insert(is_same, 0, False), np.insert(ends[:-1], 0, 0), before[above])
    passed = (next_blocks[above] == 1) & (rows["mark"][all_] == 0) & (~is_last_there | is_below[above])
    worth = (ends - previous) / rows["nbytes"][all_] * rows["nbytes"][above] / rows["n_tokens"][above]
    return all_[passed], np.clip(worth[passed], _WORTH_MIN, 1.0)


def chain_of(view: View, row: Row) -> list[Row]:
    """The checkpoints whose tokens are a prefix of that of `row`, a checkpoint, in the order of their positions."""
    chain: list[Row] = []
    ancestor: Row | None = row
    while ancestor is not None:
        chain += view.checkpoints(ancestor.parent, ancestor.tokens)
        ancestor = view.row(ancestor.parent)
    return chain[::-1]


def thin_chains(edit: Edit, added: Iterable[Row]) -> list[Row]:
    """Remove what is redundant in the chains of the checkpoints that were `added`; the rows removed."""
    removed: list[Row] = []
    for row in sorted(added, key=lambda row: -row.end):
        if row.key in edit.table:
            chain = chain_of(edit, row)
            columns = edit.table.rows[edit.table.slots(each.key for each in chain)]
            removed += (gone := [chain[at] for at in redundant(columns, [each.end for each in chain])])
            for each in gone:
                edit.remove(each)
    return removed
