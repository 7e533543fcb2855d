"""Which namespaces are encrypted, and how a namespace's key is dropped: rules over the keyring and the index."""

from __future__ import annotations

from kvstore.engine.keyring import NamespaceKey
from kvstore.engine.state import State


def encrypt(state: State, root: bytes) -> NamespaceKey | None:
    """See `Engine.encrypt`."""
    ring = state.index.ring
    with state.lock:
        with state.index.view() as view:
            _, first = next(view.children(root), (b"", b""))
            row = view.row(first) if first else None
        # All rows of a namespace are of one kind; sealed are those whose key was dropped.
        is_free = row is None or row.is_sealed
        return ring.make(root) if is_free else ring.key(root)


def shred(state: State, namespace_prefix: bytes, dry_run: bool) -> int:
    """See `Engine.shred`."""
    with state.lock:
        state.demand_place()
        ring = state.index.ring
        roots = [root for root in ring.roots if root.startswith(namespace_prefix)]
        dropped = len(roots) if dry_run else sum(ring.drop(root) for root in roots)
        state.measure_keys()
        return dropped
