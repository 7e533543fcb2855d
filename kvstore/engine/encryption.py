"""Which namespaces are encrypted, how a key is dropped, and whether the keys of what is stored are missing."""

from __future__ import annotations

import logging

from kvstore.blobs.protocol import BlobId
from kvstore.engine.adopt import Site, read_block
from kvstore.engine.keyring import NamespaceKey
from kvstore.engine.shared import Shared
from kvstore.engine.transaction import View
from kvstore.errors import InvalidRequestError, KVStoreError, NotFoundError

log = logging.getLogger(__name__)


def encrypt(shared: Shared, root: bytes) -> NamespaceKey | None:
    """See `Engine.encrypt`."""
    ring = shared.index.ring
    with shared.lock:
        if ring.is_missing:
            find_missing_keys(shared.site)  # what needs them may be evicted by now
        with shared.index.view() as view:
            first = next(view.children(root), None)
            row = view.row(first) if first else None
        # All rows of a namespace are of one kind; those that cannot be read are those whose key was dropped.
        is_free = row is None or row.is_key_missing
        return ring.make(root) if is_free else ring.key(root)


def is_key_missing(shared: Shared, root: bytes) -> bool:
    """Whether a namespace holds encrypted blocks whose keys are not where they should be."""
    if not shared.index.ring.is_missing:
        return False
    with shared.index.view() as view:
        return is_unreadable(view, root)


def is_encrypted(shared: Shared, root: bytes) -> bool:
    """See `Engine.is_encrypted`."""
    return shared.index.ring.key(root) is not None or is_key_missing(shared, root)


def shred(shared: Shared, namespace_prefix: bytes, dry_run: bool) -> int:
    """See `Engine.shred`."""
    with shared.lock:
        shared.require_place()
        ring = shared.index.ring
        roots = [root for root in ring.roots if root.startswith(namespace_prefix)]
        held = [root for root in shared.namespaces if root.startswith(namespace_prefix)]
        with shared.index.view() as view:
            plain = [root for root in held if root not in roots and not is_unreadable(view, root)]
        if plain or not (roots or held):
            named = f"namespace {plain[0].hex()[:12]} is" if plain else "no namespace that starts so is"
            raise InvalidRequestError(f"{named} not encrypted, so there is no key to shred: evict it without --shred")
        return len(roots) if dry_run else sum(ring.drop(root) for root in roots)


def is_unreadable(view: View, root: bytes) -> bool:
    """Whether a namespace holds encrypted rows whose key is not there; all rows of a namespace are of one kind."""
    first = next(view.children(root), None)
    row = view.row(first) if first else None
    return row is not None and row.is_key_missing


def find_missing_keys(site: Site) -> None:
    """Whether encrypted blobs are there and the folder of their keys is not: then the ring makes no new ones."""
    ring = site.index.ring
    was_missing, ring.is_missing = ring.is_missing, False
    if ring.has_folder:
        return
    with site.index.view() as view:
        ring.is_missing = any(is_unreadable(view, root) for root in site.index.spaces)
        if not ring.is_missing and sum(1 for _ in site.blobs.names()) != view.count():
            named = {row.blob for row in view.rows()}
            ring.is_missing = any(
                _is_unreadable_blob(site, entry.blob, entry.nbytes)
                for entry in site.blobs.names()
                if entry.blob is not None and entry.blob not in named
            )
    if ring.is_missing and not was_missing:
        log.error(
            "the keys of encrypted namespaces are missing: %s does not exist. Restore it, or evict these namespaces",
            ring.folder,
        )


def _is_unreadable_blob(site: Site, blob: BlobId, nbytes: int) -> bool:
    """Whether a blob is encrypted with a key that is not there."""
    try:
        read_block(site.blobs, blob, nbytes, verify=False)
    except NotFoundError:
        return True
    except (KVStoreError, OSError):
        return False
    return False
