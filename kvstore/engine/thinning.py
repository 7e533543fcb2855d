"""Checkpoints to keep: a few along every chain, and at most their share of the budget over all namespaces.

The chain of a checkpoint is every checkpoint whose tokens are a prefix of its own, and itself. Pure over the index, in
the commit of the store that added a checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from kvstore.engine.evict import NO_LIMIT, remove_rows
from kvstore.engine.rows import Row
from kvstore.engine.transaction import Edit, View

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
    """Remove what is too much along the chains of `added`, longest first; the rows removed."""
    removed: list[Row] = []
    for row in sorted(added, key=lambda row: -row.end):
        if not row.is_checkpoint or row.key not in edit.table:
            continue
        chain = chain_of(edit, row)
        if len(chain) <= keep_max:
            continue
        for index in spare(
            [each.end for each in chain], [edit.table.value(each.key, "mark") for each in chain], keep_max
        ):
            edit.remove(chain[index])
            removed.append(chain[index])
    return removed


def keep_share(edit: Edit, share_bytes: int, keep: Collection[bytes] = ()) -> list[Row]:
    """Remove the least recently used checkpoints of all namespaces until the rest take no more than `share_bytes`."""
    table = edit.table
    over = table.usage().checkpoint_bytes - share_bytes
    if over <= 0:
        return []
    return remove_rows(edit, table.victims(over, keep, table.where(checkpoints=True), count_max=NO_LIMIT))
