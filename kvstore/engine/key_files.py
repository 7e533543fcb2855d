"""Which keys of encrypted namespaces must stay, and whether those of what is stored are missing."""

from __future__ import annotations

import logging
from pathlib import Path

from kvstore.engine.check import Site, is_newer, named_by_us, named_files
from kvstore.engine.index import View
from kvstore.engine.keyring import KeyRing
from kvstore.engine.reading import read_block
from kvstore.errors import KVStoreError, NotFoundError

log = logging.getLogger(__name__)


def is_sealed(view: View, root: bytes) -> bool:
    """Whether a namespace holds encrypted rows whose key is not there; all rows of a namespace are of one kind."""
    _, first = next(view.children(root), (b"", b""))
    row = view.row(first) if first else None
    return row is not None and row.is_sealed


def find_missing_keys(site: Site) -> None:
    """Whether encrypted blobs are there and the folder of their keys is not: then the ring makes no new ones."""
    ring = site.index.ring
    was_missing, ring.is_missing = ring.is_missing, False
    if ring.has_folder:
        return
    with site.index.view() as view:
        ring.is_missing = any(is_sealed(view, root) for root in view.usage())
        if not ring.is_missing and sum(1 for _ in site.directory.blob_files()) != view.count():
            named = named_files(site)
            strays = (entry.path for _, entry in site.directory.blob_files() if entry.path not in named)
            ring.is_missing = any(_is_keyless(path, ring) for path in strays)
    if ring.is_missing and not was_missing:
        log.error(
            "the keys of encrypted namespaces are missing: %s does not exist. Restore it, or evict these namespaces",
            site.directory.keys,
        )


def _is_keyless(path: str, ring: KeyRing) -> bool:
    """Whether a blob is encrypted with a key that is not there."""
    try:
        if named_by_us(path):
            read_block(Path(path), verify=False, ring=ring)
    except NotFoundError:
        return True
    except (KVStoreError, OSError):
        return False
    return False


def keys_to_keep(site: Site) -> frozenset[bytes]:
    """Namespaces whose keys stay although no row is left: all there are now, while a newer kvstore's blobs lie about.

    Those have no row and are left alone, but without their key they were lost; of which namespace they are, only that
    kvstore can tell for sure. A key that is made from now on cannot be theirs, and goes with the last row as ever.
    """
    ring = site.index.ring
    with site.index.view() as view:
        # After nearly every stop there are as many files as rows, and no file has to be looked into.
        if not ring.written_roots or sum(1 for _ in site.directory.blob_files()) == view.count():
            return frozenset()
    strays = {entry.path for _, entry in site.directory.blob_files()} - named_files(site)
    return frozenset(ring.written_roots if any(is_newer(path, ring) for path in strays) else ())
