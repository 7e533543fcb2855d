"""Which namespaces are encrypted, and how a namespace's key is dropped: rules over the keyring and the index."""

from __future__ import annotations

from kvstore.engine.key_files import find_missing_keys, is_sealed
from kvstore.engine.keyring import NamespaceKey
from kvstore.engine.state import State
from kvstore.errors import InvalidRequestError


def encrypt(state: State, root: bytes) -> NamespaceKey | None:
    """See `Engine.encrypt`."""
    ring = state.index.ring
    with state.lock:
        if ring.is_missing:
            find_missing_keys(state.site)  # what needs them may be evicted by now
        with state.index.view() as view:
            _, first = next(view.children(root), (b"", b""))
            row = view.row(first) if first else None
        # All rows of a namespace are of one kind; sealed are those whose key was dropped.
        is_free = row is None or row.is_sealed
        return ring.make(root) if is_free else ring.key(root)


def is_key_missing(state: State, root: bytes) -> bool:
    """Whether a namespace holds encrypted blocks whose keys are not where they should be."""
    if not state.index.ring.is_missing:
        return False
    with state.index.view() as view:
        return is_sealed(view, root)


def is_encrypted(state: State, root: bytes) -> bool:
    """See `Engine.is_encrypted`."""
    return state.index.ring.key(root) is not None or is_key_missing(state, root)


def shred(state: State, namespace_prefix: bytes, dry_run: bool) -> int:
    """See `Engine.shred`."""
    with state.lock:
        state.demand_place()
        ring = state.index.ring
        roots = [root for root in ring.roots if root.startswith(namespace_prefix)]
        held = [root for root in state.namespaces if root.startswith(namespace_prefix)]
        with state.index.view() as view:
            plain = [root for root in held if root not in roots and not is_sealed(view, root)]
        if plain or not (roots or held):
            named = f"namespace {plain[0].hex()[:12]} is" if plain else "no namespace that starts so is"
            raise InvalidRequestError(f"{named} not encrypted, so there is no key to shred: evict it without --shred")
        return len(roots) if dry_run else sum(ring.drop(root) for root in roots)
