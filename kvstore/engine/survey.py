"""Looking at an engine without changing it: what `kvstore ls`, `show` and `stats` tell. Any thread."""

from __future__ import annotations

import os
from dataclasses import astuple, replace
from pathlib import Path

from kvstore.engine.nouns import BlockInfo, EngineStats, NamespaceUsage
from kvstore.engine.state import State

SHOW_MAX = 100


def list_blocks(state: State, namespace_prefix: bytes, limit: int) -> list[BlockInfo]:
    """Up to `limit` blocks and checkpoints of the namespaces that start so, most recently used first."""
    found: list[BlockInfo] = []
    with state.index.view() as view:
        for stamp, key in view.newest():
            if len(found) >= limit:
                break
            row = view.row(key)
            if row is not None and row.root.startswith(namespace_prefix):
                found.append(BlockInfo(row, stamp // 1_000_000, state.directory.path(row)))
    return found


def show(state: State, key_prefix: bytes) -> list[BlockInfo]:
    """Blocks and checkpoints whose key starts so, at most SHOW_MAX."""
    found: list[BlockInfo] = []
    with state.index.view() as view:
        for row in view.rows(key_prefix):
            if len(found) >= SHOW_MAX:
                break
            found.append(BlockInfo(row, view.stamp(row.key) // 1_000_000, state.directory.path(row)))
    return found


def stats(state: State, free_bytes: int) -> EngineStats:
    """Counts of this moment."""
    usage, ledger = state.usage, state.ledger
    spaces = tuple(
        replace(NamespaceUsage(info, *astuple(use)), encrypted=state.index.ring.key(root) is not None)
        for root, info in list(state.namespaces.items())
        if (use := usage.get(root)) is not None
    )
    return EngineStats(
        used_bytes=ledger.total,
        budget_bytes=state.options.budget_bytes,
        free_bytes=free_bytes,
        free_floor_bytes=state.options.free_floor_bytes,
        blobs=sum(use.blocks + use.checkpoints for use in usage.values()),
        stored_bytes=ledger.get("blobs"),
        pending_bytes=ledger.get("pending"),
        index_bytes=ledger.get("index"),
        staging_bytes=ledger.get("staging"),
        quarantine_bytes=ledger.get("quarantine"),
        quarantined=_count(state.directory.quarantine),
        written_bytes=state.counts.written_bytes,
        evictions=state.evictions.totals(),
        degraded=state.counts.degraded,
        namespaces=spaces,
        checkpoints=sum(use.checkpoints for use in usage.values()),
        checkpoint_bytes=sum(use.checkpoint_bytes for use in usage.values()),
        checkpoint_share_bytes=state.options.checkpoint_share_bytes,
    )


def _count(folder: Path) -> int:
    """How many files; none when the folder cannot be read, which `degraded` is about."""
    try:
        return len(os.listdir(folder))
    except OSError:
        return 0
