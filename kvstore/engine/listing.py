"""What `kvstore ls`, `show` and `stats` tell: reads an engine without changing it. Any thread."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import astuple, replace
from pathlib import Path

from kvstore.engine.rows import Row
from kvstore.engine.shared import Shared
from kvstore.engine.types import BlockInfo, EngineStats, NamespaceUsage

SHOW_MAX = 100


def list_blocks(shared: Shared, namespace_prefix: bytes, limit: int) -> list[BlockInfo]:
    """Up to `limit` blocks and checkpoints of the namespaces that start so, most recently used first."""
    with shared.lock:
        spaces = shared.index.spaces.items()
        numbers = [space.number for root, space in spaces if root.startswith(namespace_prefix)]
        keys = shared.index.table.recent(numbers, limit)
    with shared.index.view() as view:
        return _infos(shared, (row for key in keys if (row := view.row(key)) is not None))


def show(shared: Shared, key_prefix: bytes) -> list[BlockInfo]:
    """Blocks and checkpoints whose key starts so, at most SHOW_MAX."""
    with shared.index.view() as view:
        rows = [row for row, _ in zip(view.rows(key_prefix), range(SHOW_MAX), strict=False)]
    return _infos(shared, rows)


def _infos(shared: Shared, rows: Iterable[Row]) -> list[BlockInfo]:
    value = shared.index.table.value
    return [
        BlockInfo(row, value(row.key, "nbytes"), value(row.key, "used_s"), shared.blobs.path(row.blob) or row.blob.name)
        for row in rows
    ]


def stats(shared: Shared, free_bytes: int) -> EngineStats:
    """Counts of this moment."""
    with shared.lock:
        usage = {root: shared.usage(root) for root in shared.namespaces}
        total = shared.index.table.usage()
    ledger = shared.ledger
    spaces = tuple(
        replace(
            NamespaceUsage(shared.namespaces[root], *astuple(use)),
            encrypted=shared.index.ring.key(root) is not None,
            used_s=shared.index.spaces[root].used_s,
            orphaned=shared.is_orphan(shared.index.spaces[root]),
        )
        for root, use in usage.items()
        if root in shared.namespaces and root in shared.index.spaces
    )
    return EngineStats(
        used_bytes=ledger.total,
        budget_bytes=shared.options.budget_bytes,
        free_bytes=free_bytes,
        free_floor_bytes=shared.options.free_floor_bytes,
        blobs=total.blocks + total.checkpoints,
        stored_bytes=ledger.get("blobs"),
        pending_bytes=ledger.get("pending"),
        index_bytes=ledger.get("index"),
        staging_bytes=ledger.get("staging"),
        quarantine_bytes=ledger.get("quarantine"),
        quarantined=_count(shared.directory.quarantine),
        written_bytes=shared.health.written_bytes,
        evictions=shared.evictions.totals(),
        degraded=shared.health.degraded,
        namespaces=spaces,
        checkpoints=total.checkpoints,
        checkpoint_bytes=total.checkpoint_bytes,
        checkpoint_share_bytes=shared.options.checkpoint_share_bytes,
    )


def _count(folder: Path) -> int:
    """How many files; none when the folder cannot be read, which `degraded` is about."""
    try:
        return len(os.listdir(folder))
    except OSError:
        return 0
