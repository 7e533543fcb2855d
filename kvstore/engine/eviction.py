"""Which rows go, in which order: least recently used first, and never a parent before its children."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field

from kvstore.engine.index import Edit, View
from kvstore.engine.nouns import Selection
from kvstore.engine.rows import Row
from kvstore.errors import InvalidRequestError

Pick = Callable[[Row, int], bool]
NO_LIMIT = 1 << 62
# Rows removed in one commit: bounds the transaction, and how long a reader of the disk sees files without rows.
ROWS_MAX = 1024


@dataclass
class Sweep:
    """One pass over the access order, which may take several transactions. `keep`: keys that stay whatever happens.

    `removed_bytes` are those of the rows removed; `kept_bytes` of them are in files that could not go yet.
    """

    pick: Pick
    keep: Container[bytes] = frozenset()
    need_bytes: int = NO_LIMIT
    checkpoints_only: bool = False
    removed_bytes: int = 0
    kept_bytes: int = 0
    blocks: int = 0
    done: bool = False
    _after: bytes = field(default=b"")
    _before: tuple[int, int, bytes] = field(default=(0, 0, b""))

    def step(self, edit: Edit) -> list[Row]:
        """Remove the rows of up to ROWS_MAX picked leaves; `done` once the need is met or the order is at its end."""
        self._before = (self.removed_bytes, self.blocks, self._after)
        removed: list[Row] = []
        while self.removed_bytes < self.need_bytes and len(removed) < ROWS_MAX:
            found = next(edit.order(self._after, self.checkpoints_only), None)
            if found is None:
                break
            self._after, stamp, key = found
            row = None if key in self.keep else edit.row(key)
            if row is None or not self.pick(row, stamp):
                continue
            child = next(edit.children(key), None)
            if child is not None:
                # Used through its child, so it is as recent as that. It moves behind it, and comes up again.
                edit.touch(key, edit.stamp(child[1]))
                continue
            edit.remove(row)
            removed.append(row)
            self.removed_bytes += row.disk_bytes
        self.blocks += len(removed)
        self.done = len(removed) < ROWS_MAX
        return removed

    def rewind(self) -> None:
        """As if the last step had not been made: its transaction was not committed."""
        self.removed_bytes, self.blocks, self._after = self._before
        self.done = False

    @property
    def freed_bytes(self) -> int:
        """What left the disk."""
        return self.removed_bytes - self.kept_bytes


def picker(view: View, selection: Selection, now_s: float) -> Pick:
    """A selection as a predicate. InvalidRequestError when it selects nothing in particular and does not say `all`."""
    conditions = (selection.namespace_prefix, selection.key_prefix, selection.idle_s > 0, selection.bytes > 0)
    if not any(conditions) and not selection.all:
        raise InvalidRequestError("say what to evict: a namespace, a key, an age, a number of bytes, or all")
    subtree: frozenset[bytes] | None = None
    if selection.key_prefix:
        heads = view.rows(selection.key_prefix)
        subtree = frozenset(row.key for head in heads for row in view.tree(head))
    latest = (now_s - selection.idle_s) * 1_000_000 if selection.idle_s > 0 else None

    def pick(row: Row, stamp: int) -> bool:
        if not row.root.startswith(selection.namespace_prefix):
            return False
        if subtree is not None and row.key not in subtree:
            return False
        return latest is None or stamp <= latest

    return pick
