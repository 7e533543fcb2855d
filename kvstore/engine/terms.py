"""What pins, quotas and times to live mean for the table of blobs: what goes, what stays, what a change would delete.

Any thread may call, without the engine's lock unless it says otherwise.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from kvstore.core.text import size_text
from kvstore.engine.bases import UNUSED_S
from kvstore.engine.evictions import BUDGET, FLOOR, QUOTA, TTL
from kvstore.engine.keep import PINS_DIVISOR, Terms
from kvstore.engine.retain import Mask, pinned_bytes, reachable_bytes, released_bytes, victims, where
from kvstore.engine.shared import Shared
from kvstore.errors import DirectoryError, LimitError, NotFoundError
from kvstore.index.table import Table

Choose: TypeAlias = Callable[[Table], Mask]
# A warning precedes evictions that remove more than this part of the store.
_MANY_DIVISOR = 10
log = logging.getLogger(__name__)


def over_terms(shared: Shared) -> Iterator[tuple[str, int, Choose]]:
    """(why, bytes to free, what may go) of namespaces that are over their terms. Call it without the lock."""
    table, leased = shared.settled_table(), shared.deletions.leased()
    unused = functools.partial(where, aux=True, unused_since_s=int(shared.ttl_clock() - UNUSED_S))
    if shared.index.table.usage().aux_blocks and (nbytes := reachable_bytes(table, leased, unused(table))):
        yield TTL, nbytes, unused
    for root, space in list(shared.index.spaces.items()):
        terms = shared.keep.terms.get(root, Terms())
        own = functools.partial(where, namespaces=[space.number])
        if ttl_s := terms.ttl_s or shared.options.ttl_s:
            aged = functools.partial(own, unused_since_s=int(shared.ttl_clock() - ttl_s))
            if nbytes := reachable_bytes(table, leased, aged(table)):
                yield TTL, nbytes, aged
        over = shared.index.table.usage(space.number).disk_bytes - terms.quota_bytes if terms.quota_bytes else 0
        if over > 0 and reachable_bytes(table, leased, own(table)):
            yield QUOTA, over, own


def preview(table: Table, need_bytes: int, mask: Mask, policy: str) -> tuple[int, int]:
    """(blobs, bytes on disk) that an eviction of a selection would take. `table`: a snapshot."""
    keys = victims(table, need_bytes, mask=mask, policy=policy, count_max=len(table) or 1)
    return len(keys), sum(table.value(key, "nbytes") for key in keys) + released_bytes(table, keys)


def warn_of_deletions(shared: Shared, short_bytes: int, wait_s: float) -> bool:
    """Whether the limits in force delete more than a tenth of what is stored, as a typo can; then there is a WARN.

    `short_bytes`: what the volume lacks of the free floor. `wait_s`: how long nothing goes. Call it without the lock.
    """
    held, options = shared.ledger.get("blobs"), shared.options
    # What is pinned stays, whatever the limits.
    table = shared.settled_table()
    reachable = reachable_bytes(table)
    over = Counter({BUDGET: min(reachable, shared.ledger.total - options.budget_bytes)})
    over[FLOOR] = min(reachable, short_bytes)
    for cause, nbytes, choose in over_terms(shared):
        over[cause] += min(nbytes, reachable_bytes(table, mask=choose(table)))
    cause, most = over.most_common(1)[0]
    if not held or most <= held // _MANY_DIVISOR:
        return False
    sizes = map(size_text, (min(held, most), held, options.budget_bytes, options.free_floor_bytes))
    lost, all_, budget, floor = sizes
    limits = f"budget_bytes is {budget}, free_floor_bytes {floor}; quotas and times to live: kvstore show NAMESPACE"
    when = f" in {wait_s:.0f} s, unless limits change (with --yes it starts at once)" if wait_s else ""
    log.warning("about to delete %s of %s stored (%s)%s: %s", lost, all_, cause, when, limits)
    return True


def end_pins(shared: Shared, choose: Choose) -> None:
    """What is evicted by its name is no longer pinned. Raises OSError."""
    table = shared.index.table.snapshot()
    selected = set(table.keys(np.flatnonzero(choose(table)).tolist()))
    gone = selected & shared.keep.pins.keys()
    if gone:
        unpin(shared, sorted(gone))


def unpin(shared: Shared, keys: Sequence[bytes]) -> int:
    """Let these blobs go like others: bytes that the other pins keep on disk. Raises OSError."""
    shared.keep.remove_pins(keys)
    with shared.lock:
        shared.index.table.pin(shared.keep.pins)
        shared.measure()
    return pinned_bytes(shared.index.table.snapshot())


class Keeper:
    """The engine's terms and pins. Changes are durable and in force on return; DirectoryError when they are not."""

    def __init__(self, shared: Shared, enforce: Callable[[bool], None]) -> None:
        self._shared = shared
        self._enforce = enforce

    @property
    def pins(self) -> Mapping[bytes, bytes]:
        """Keys of pinned blobs, each with its namespace."""
        return self._shared.keep.pins

    @property
    def namespaces(self) -> frozenset[bytes]:
        """Those that have terms."""
        return frozenset(self._shared.keep.terms)

    def terms(self, root: bytes) -> Terms:
        """Of a namespace."""
        return self._shared.keep.terms.get(root, Terms())

    def named(self, alias: str) -> list[bytes]:
        """The namespaces with terms that had this alias when these were set, also those that hold nothing now."""
        return [root for root, terms in self._shared.keep.terms.items() if alias and terms.alias == alias]

    def change_terms(self, root: bytes, terms: Terms, *, at_once: bool = False) -> None:
        """Evicts what is over them: as `Engine.limit`. A namespace that is evicted keeps its terms.

        LimitError: too many have some.
        """
        self._shared.require_place()
        info = self._shared.namespaces.get(root)
        alias = info.alias if info else self.terms(root).alias
        try:
            self._shared.keep.change_terms(root, replace(terms, alias=alias))
        except OSError as error:
            raise DirectoryError(f"the terms of a namespace could not be written: {error}") from error
        with self._shared.lock:
            self._shared.measure()
        self._enforce(at_once)

    def would_delete(
        self, *, budget_bytes: int = 0, ttl_s: int = 0, root: bytes = b"", terms: Terms | None = None
    ) -> tuple[int, int]:
        """(bytes that these limits would delete at once, bytes stored). A limit of 0 is none.

        `terms` are those of the namespace `root`; without them `ttl_s` is that of all.
        """
        shared = self._shared
        table, held = shared.settled_table(), shared.index.table.usage().disk_bytes
        over = [min(shared.ledger.total - budget_bytes, reachable_bytes(table))] if budget_bytes else []
        space, only = shared.index.spaces.get(root), None
        if space is not None and terms is not None:
            only, ttl_s = [space.number], terms.ttl_s
            used = shared.index.table.usage(space.number).disk_bytes
            excess = used - terms.quota_bytes if terms.quota_bytes else 0
            over.append(min(excess, reachable_bytes(table, mask=where(table, namespaces=only))))
        if ttl_s:
            aged = where(table, namespaces=only, unused_since_s=int(shared.ttl_clock() - ttl_s))
            over.append(reachable_bytes(table, mask=aged))
        return max(0, min(held, max(over, default=0))), held

    def pin(self, root: bytes, keys: Sequence[bytes]) -> int:
        """Keep these blobs and what leads to them until they are unpinned, or evicted by name.

        Returns the bytes on disk that all pins keep. NotFoundError when a blob is not there, LimitError when pins would
        keep too much: then nothing was changed.
        """
        shared = self._shared
        shared.require_place()
        table, before, most = shared.index.table, shared.keep.pins, shared.options.budget_bytes // PINS_DIVISOR
        with_them = table.snapshot()
        with_them.pin([*before, *keys])
        if (nbytes := pinned_bytes(with_them)) > most:
            words = f"with it pins would keep {size_text(nbytes)}, and they may keep {size_text(most)}"
            raise LimitError(f"{words}: 1/{PINS_DIVISOR} of the budget")
        with shared.lock:
            if len(table.slots(keys)) < len(keys):
                raise NotFoundError("it was evicted meanwhile")
            gone = [key for key in before if key not in table]
            table.pin([*before, *keys])
        # From here on nothing evicts them, so that what is written is there.
        try:
            shared.keep.remove_pins(gone)
            shared.keep.add_pins(root, keys)
        except OSError as error:
            raise DirectoryError(f"the pin could not be written: {error}") from error
        finally:
            with shared.lock:
                shared.index.table.pin(shared.keep.pins)
                shared.measure()
        return nbytes

    def pinned_bytes(self) -> tuple[int, int]:
        """(what all pins keep on disk, what they may keep)."""
        shared = self._shared
        return pinned_bytes(shared.index.table.snapshot()), shared.options.budget_bytes // PINS_DIVISOR

    def unpin(self, keys: Sequence[bytes]) -> int:
        """Let these blobs go like others. Returns the bytes on disk that the other pins keep."""
        try:
            return unpin(self._shared, keys)
        except OSError as error:
            raise DirectoryError(f"pins could not be written: {error}") from error
