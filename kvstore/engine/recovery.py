"""The index at start: opened, made anew where it must be, and in step with the blob folders."""

from __future__ import annotations

import logging

from kvstore.engine import check as checking
from kvstore.engine.blobs import Fs
from kvstore.engine.directory import Directory, Hold
from kvstore.engine.index import Index
from kvstore.engine.ledger import Ballast
from kvstore.engine.nouns import EngineOptions
from kvstore.errors import CorruptDataError, StoreFullError

log = logging.getLogger(__name__)


def recovered_index(directory: Directory, hold: Hold, options: EngineOptions, fs: Fs) -> Index:
    """Open the index and, unless the last stop was clean, put it in step; on a full disk the ballast makes room."""
    try:
        return _in_step(directory, hold, options, fs)
    except StoreFullError:
        if not Ballast(directory.ballast, 0).drop():
            raise
        return _in_step(directory, hold, options, fs)


def _in_step(directory: Directory, hold: Hold, options: EngineOptions, fs: Fs) -> Index:
    """Open the index and, unless the last stop was clean, put it and the blob folders in step."""
    index, replaced = checking.open_index(directory, fs, options.durability != "none", options.map_bytes)
    site = checking.Site(directory, index, fs)
    try:
        with index.view() as view:
            empty = not view.count()
            # What the engine reads first, read once here, where damage leads to a rebuild.
            _ = view.usage(), view.namespaces(), next(view.newest(), None)
        unsynced = not hold.previous.get("clean") and hold.previous.get("durability") == "none"
        if replaced or unsynced or (empty and any(directory.blob_files())):
            checking.rebuild(site)
        elif index.was_short or not hold.previous.get("clean"):
            checking.sweep(site)
        return index
    except CorruptDataError:
        log.warning("the index is damaged; it is made anew from the blobs", exc_info=True)
        index.close()
    except BaseException:
        index.close()
        raise
    checking.set_index_aside(directory, fs)
    index = Index(directory.index, fs, options.durability != "none", options.map_bytes)
    checking.rebuild(checking.Site(directory, index, fs))
    return index
