"""What goes and what stays: the policies that choose blobs to evict, and which checkpoints a chain keeps.

Policies are functions from rows of `kvstore.index.table` to scores. The blob with the lowest score is evicted first,
but never a parent before its children, so that every blob stays reachable from its root.

Checkpoints are bounded twice, in the commit of the store that added one: along every chain, and in all by their share
of the budget. The chain of a checkpoint is every checkpoint whose tokens are a prefix of its own, and itself.

Threads: hold the engine's lock, or use a `Table.snapshot`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvstore.index.rows import Row
from kvstore.index.table import CHECKPOINT, INTERIM, LIVE, PINNED, Rows, Table
from kvstore.index.transaction import Edit, View

# Blobs removed in one commit: bounds the transaction, and how long the engine's lock is held.
VICTIMS_MAX = 1024
NO_LIMIT = 1 << 62
Mask: TypeAlias = npt.NDArray[np.bool_]

# Scores by which blobs go, lowest first.
POLICIES: dict[str, Callable[[Rows], npt.NDArray[Any]]] = {
    "lru": lambda rows: rows["last_use"],
}


def where(
    table: Table,
    *,
    namespaces: Collection[int] | None = None,
    unused_since_s: int | None = None,
    checkpoints: bool = False,
) -> Mask:
    """A selection of blobs; conditions are ANDed."""
    rows = table.rows
    mask: Mask = (rows["flags"] & LIVE) != 0
    if namespaces is not None:
        mask &= np.isin(rows["namespace"], list(namespaces))
    if unused_since_s is not None:
        mask &= rows["used_s"] <= max(0, unused_since_s)
    if checkpoints:
        mask &= (rows["flags"] & CHECKPOINT) != 0
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
    return int(table.rows["nbytes"][_free(table, keep, mask)].sum())


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
    rows, free = table.rows, _free(table, keep, mask)
    leaves = np.flatnonzero(free & (rows["children"] == 0))
    scores = POLICIES[policy](rows[leaves])
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
            own = POLICIES[policy](rows[above : above + 1])[0].item()
            heapq.heappush(heap, (max(score, own), -int(rows["depth"][above]), above))
    return table.keys(named)


def pinned_bytes(table: Table) -> int:
    """What pinned blobs and their ancestors cost on disk."""
    return int(table.rows["nbytes"][_kept(table, ())].sum())


def _free(table: Table, keep: Iterable[bytes], mask: Mask | None) -> Mask:
    """What is selected, without `keep`, what is pinned, and the ancestors of both."""
    return (where(table) if mask is None else mask) & ~_kept(table, keep)


def _kept(table: Table, keep: Iterable[bytes]) -> Mask:
    rows = table.rows
    kept: Mask = (rows["flags"] & PINNED) != 0
    for start in [*np.flatnonzero(kept).tolist(), *table.slots(keep)]:
        slot = start
        while slot >= 0 and (slot == start or not kept[slot]):
            kept[slot] = True
            slot = int(rows["parent"][slot])
    return kept


def remove_rows(edit: Edit, keys: Sequence[bytes]) -> list[Row]:
    """Remove the rows of keys, children before parents; returns them."""
    rows = [row for key in keys if (row := edit.row(key)) is not None]
    for row in rows:
        edit.remove(row)
    return rows


# -- checkpoints --------------------------------------------------------------------------------------------------

# Places of a chain that are not for marks: the first, the two newest, and two spaced ones.
_NOT_FOR_MARKS = 5
# To prefill a token or a few takes equally long, so checkpoints that are closer than this hardly add anything.
_FEW_TOKENS = 256


def chain_of(view: View, row: Row) -> list[Row]:
    """The checkpoints whose tokens are a prefix of that of `row`, a checkpoint, in the order of their positions."""
    chain: list[Row] = []
    here: Row | None = row
    while here is not None:
        chain += view.checkpoints(here.parent, here.tokens)
        here = view.row(here.parent)
    return chain[::-1]


def spare(positions: Sequence[int], marks: Sequence[int], keep_max: int) -> list[int]:
    """Which of a chain are to go: indices into ascending `positions`; `marks`: when each was marked, 0 for never."""
    last = len(positions) - 1
    kept = [last, 0, max(0, last - 1)][:keep_max]
    marked = sorted((at for at in range(last) if marks[at] and at not in kept), key=lambda at: -marks[at])
    kept += marked[: max(0, keep_max - _NOT_FOR_MARKS)]
    left = list(range(len(positions)))
    while len(left) > max(1, keep_max):
        inner = [at for at in range(1, len(left) - 1) if left[at] not in kept]
        if not inner:
            left = [index for index in left if index in kept]
            break
        del left[min(inner, key=lambda at: _loss([positions[index] for index in left], at))]
    return sorted(set(range(len(positions))) - set(left))


def _loss(positions: Sequence[int], at: int) -> float:
    """How many times what it must a prompt would prefill at worst without the checkpoint `at`."""
    end = positions[-1] + _FEW_TOKENS
    return (end - positions[at - 1]) / (end - positions[at + 1])


def thin_chains(edit: Edit, added: Iterable[Row], keep_max: int) -> list[Row]:
    """Remove what is too much along the chains of `added`, longest first, and what is passed; the rows removed."""
    removed: list[Row] = []
    for row in sorted(added, key=lambda row: -row.end):
        if not row.is_checkpoint or row.key not in edit.table:
            continue
        chain = chain_of(edit, row)
        passed = [each for each in chain[:-1] if _is_passed(edit, each)]
        chain = [each for each in chain if each not in passed]
        marks = [edit.table.value(each.key, "mark") for each in chain]
        spared = [chain[index] for index in spare([each.end for each in chain], marks, keep_max)]
        for each in (*passed, *(spared if len(chain) > keep_max else ())):
            if not edit.table.value(each.key, "flags") & PINNED:
                edit.remove(each)
                removed.append(each)
    return removed


def _is_passed(edit: Edit, row: Row) -> bool:
    """Whether a checkpoint before another one was interim, and no prompt was seen to diverge after it."""
    return bool(edit.table.value(row.key, "flags") & INTERIM) and not edit.table.value(row.key, "mark")


def keep_share(edit: Edit, share_bytes: int, keep: Collection[bytes] = ()) -> list[Row]:
    """Remove the least recently used checkpoints of all namespaces until the rest take no more than `share_bytes`."""
    table = edit.table
    over = table.usage().checkpoint_bytes - share_bytes
    if over <= 0:
        return []
    return remove_rows(edit, victims(table, over, keep, where(table, checkpoints=True), count_max=NO_LIMIT))
