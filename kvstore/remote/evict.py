"""Eviction from the remote store: by age or down to a size, leaves first, by names alone.

A lifecycle rule of a bucket deletes by age, and so the shared heads first, which were written before all that
builds on them; what is left cannot be reached. Here a block counts as old as the newest object that builds on it, so
nothing goes before its descendants. The age is that of the object: a store does not know when it was read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvstore.core.breaker import Deadline
from kvstore.errors import InvalidRequestError
from kvstore.remote.object_names import IDENTITY, ObjectName, parse_object_name
from kvstore.remote.object_store import CALL_S, PAGE_NAMES_MAX, PROBE, Listed, ObjectStore, every_object

# A write that began so long ago has ended, or never will.
LEFTOVER_S = 86_400.0


@dataclass(frozen=True, slots=True)
class RemoteEvicted:
    """What was evicted, or would be, and what is left."""

    objects: int
    nbytes: int
    left_objects: int
    left_bytes: int
    leftovers: int = 0


def evict_remote(
    store: ObjectStore,
    *,
    older_s: float | None = None,
    bytes_max: int | None = None,
    dry_run: bool = False,
    clock: Callable[[], float] = time.time,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> RemoteEvicted:
    """Delete what nothing younger than `older_s` builds on, then the oldest until `bytes_max` are left.

    A kill leaves less than before and nothing without its ancestors. Also removes what interrupted writes left
    behind. `tell(deleted, of all that go)`. InvalidRequestError without a rule; RemoteError, DeadlineError.
    """
    if older_s is None and bytes_max is None:
        raise InvalidRequestError("give an age or a size: how old objects must be, or how many bytes may stay")
    store.require_mark(Deadline(CALL_S))
    now_s = clock()
    objects = list(every_object(store))
    blocks = [(name, one) for one in objects if (name := parse_object_name(one.name)) is not None]
    total = sum(one.head.nbytes for _, one in blocks)
    going: list[Listed] = []
    left_bytes = total
    for newest_s, one in leaves_first(blocks):
        is_old = older_s is not None and newest_s <= now_s - older_s
        if not is_old and (bytes_max is None or left_bytes <= bytes_max):
            break
        going.append(one)
        left_bytes -= one.head.nbytes
    leftovers = 0
    if not dry_run:
        for at in range(0, len(going), PAGE_NAMES_MAX):
            store.delete([one.name for one in going[at : at + PAGE_NAMES_MAX]], Deadline(CALL_S))
            tell(min(at + PAGE_NAMES_MAX, len(going)), len(going))
        leftovers = _clean_up(store, objects, {one.name for one in going}, now_s)
    return RemoteEvicted(len(going), total - left_bytes, len(blocks) - len(going), left_bytes, leftovers)


def leaves_first(blocks: Iterable[tuple[ObjectName, Listed]]) -> list[tuple[float, Listed]]:
    """(newest time among an object and all that builds on it, object): the oldest first, a child before its parent."""
    by_key: dict[tuple[str, str], list[tuple[ObjectName, Listed]]] = {}
    for name, one in blocks:
        by_key.setdefault((name.folder, name.key), []).append((name, one))
    depths: dict[tuple[str, str], int] = {}
    for key in by_key:
        path: list[tuple[str, str]] = []
        at = key
        while at in by_key and at not in depths and at not in path[-1:]:
            depths[at] = 0  # names that lead in a circle are forged: the walk ends where it began
            path.append(at)
            at = (at[0], by_key[at][0][0].parent)
        depth = depths.get(at, 0)
        for step in reversed(path):
            depth += 1
            depths[step] = depth
    newest = {key: max(one.modified_s for _, one in some) for key, some in by_key.items()}
    for key in sorted(by_key, key=lambda one: -depths[one]):
        parent = (key[0], by_key[key][0][0].parent)
        if parent in newest:
            newest[parent] = max(newest[parent], newest[key])
    order = sorted(by_key, key=lambda one: (newest[one], -depths[one]))
    return [(newest[key], one) for key in order for _, one in by_key[key]]


def _clean_up(store: ObjectStore, objects: Iterable[Listed], gone: set[str], now_s: float) -> int:
    """Remove temporary files, probes, and identities of namespaces that hold nothing any more."""
    leftovers = store.sweep(LEFTOVER_S, Deadline(CALL_S))
    rest = [one for one in objects if one.name not in gone]
    held = {name.folder for one in rest if (name := parse_object_name(one.name)) is not None}
    old = [
        one.name
        for one in rest
        if (one.name.startswith(PROBE) or (one.name.endswith(f"/{IDENTITY}") and one.name.split("/")[0] not in held))
        and one.modified_s <= now_s - LEFTOVER_S
    ]
    store.delete(old, Deadline(CALL_S))
    return leftovers + len(old)
