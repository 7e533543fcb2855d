"""Startup recovery: validates the index, opens or rebuilds it, and reconciles it with the blobs."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvstore.blobs.fs import Fs, unlink_quietly
from kvstore.blobs.protocol import BlobId, Entry
from kvstore.engine.adopt import (
    Site,
    batched,
    find_missing_keys,
    keep_number,
    quarantine,
    read_block,
    read_strays,
    settle_strays,
)
from kvstore.engine.bases import lose
from kvstore.engine.check import CheckReport, Finding, Tell, Walk
from kvstore.engine.directory import claim
from kvstore.engine.ledger import Ballast
from kvstore.engine.shared import EngineOptions, Place
from kvstore.errors import CorruptDataError, LimitError, NotFoundError, StoreFullError, UnknownFormatError
from kvstore.index.children import is_linked
from kvstore.index.index import MAP_BYTES, REBUILDING, Index
from kvstore.index.rows import Row
from kvstore.index.transaction import View
from kvstore.index.validate import digest, require_whole

SWEEP_ROWS = 1024
# Errors of reading the index that say nothing of the index: a rebuild would put a sound one aside.
_OF_THE_PROCESS = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
log = logging.getLogger(__name__)


def recovered_index(place: Place) -> Index:
    """Open the index and, unless the last stop was clean, reconcile it; on a full disk the ballast makes room.

    What was deleted and is still on the disk is unlinked first, so that no rebuild finds it.
    """
    try:
        place.tombstones.settle()
    except OSError as error:
        log.warning("deleted blobs are still on the disk; the next upkeep tries again: %s", error)
    try:
        return _reconciled(place)
    except StoreFullError:
        if not Ballast(place.directory.ballast, 0).drop():
            raise
        return _reconciled(place)


def _reconciled(place: Place) -> Index:
    try:
        index = open_validated(place)
    except CorruptDataError as error:
        return _rebuilt(place, error)
    try:
        with index.view() as view:
            rebuilding = view.meta(REBUILDING)
        if not place.held.previous.get("clean") and place.sync:
            # The stop may have come before the name of a compacted index was durable.
            place.fs.fsync_dir(str(index.path))
        unsynced = not place.held.previous.get("clean") and place.held.previous.get("durability") == "none"
        if unsynced or rebuilding:
            rebuild(place.site(index))
        elif index.was_short or not place.held.previous.get("clean"):
            place.dropped = sweep(place.site(index))
        return index
    except CorruptDataError as error:
        index.close()
        return _rebuilt(place, error)
    except BaseException:
        index.close()
        raise


def _rebuilt(place: Place, why: CorruptDataError) -> Index:
    """An index from blob headers alone; the old one is closed."""
    log.warning("the index is damaged; it goes to quarantine and is rebuilt from the blobs: %s", why)
    set_index_aside(place)
    index = place.open_index()
    try:
        rebuild(place.site(index))
    except BaseException:
        index.close()
        raise
    return index


def open_validated(place: Place) -> Index:
    """Open the index if it is unchanged since the last orderly stop, or if all its pages are valid.

    Raises CorruptDataError otherwise: LMDB trusts every offset it reads, so a damaged page would crash the process.
    OSError where this process may not read it, or lacks what it needs for that.
    """
    path = place.directory.index / "data.mdb"
    left = place.held.previous.get("index") if place.held.previous.get("clean") else None
    try:
        if not isinstance(left, str):
            require_whole(path)
        elif (found := digest(path)) != left:
            raise CorruptDataError(f"{path} is {'not what the last stop left' if found else 'gone'}")
    except OSError as error:
        if error.errno in _OF_THE_PROCESS:
            raise
        raise CorruptDataError(f"{path}: {error}") from error
    return place.open_index()


def rebuild(site: Site) -> None:
    """Fill the index from blob headers, verifying every checksum. UnknownFormatError when a blob has another version.

    The index says meanwhile that it is being rebuilt: a start that finds the word begins again. Without it, a start
    after a kill in the middle would take every blob that has no row yet for a stray. The word stays while keys are
    missing: the blobs that need them get their rows when the keys are back.
    """
    with site.index.edit() as edit:
        edit.clear()
        edit.set_meta(REBUILDING, 1)
    found = read_strays(site, [entry for entry in site.blobs.names() if entry.blob not in site.busy()])
    if found.unknown:
        entry, detail = found.unknown[0]
        raise UnknownFormatError(f"{entry.place}: {detail}")
    settle_strays(site, found)
    find_missing_keys(site)
    if not site.index.ring.is_missing:
        with site.index.edit() as edit:
            edit.set_meta(REBUILDING, 0)
    if found.sound:
        log.warning("the index was rebuilt from %d blobs", len(found.sound))


def sweep(site: Site) -> list[Row]:
    """After an unclean stop under synced commits: delete blobs without a row, drop rows without their blob.

    What has a row has its bytes. Blobs of another format version stay, and foreign names go to quarantine. Returns the
    rows that were dropped. CorruptDataError when the index contradicts itself.
    """
    entries, others = {}, []
    for entry in site.blobs.names():
        if entry.blob is None or entry.is_unfinished:
            others.append(entry)
        else:
            entries[entry.blob] = entry
    with site.index.view() as view:
        named = {row.blob for row in _linked_rows(view)}
        lost = [row for row in view.rows() if not row.is_lost and _nbytes(entries, row) != row.blob_bytes]
        gone = {row.key: row for top in lost if not top.is_aux for row in reversed(view.tree(top))}
    for row in lost:
        if row.is_aux:
            lose(site, row, keep_blob=False)
    # Children before parents, a batch a commit: a million rows do not fit in one transaction.
    for batch in batched(sorted(gone.values(), key=lambda row: -row.depth), SWEEP_ROWS):
        with site.index.edit() as edit:
            for row in batch:
                edit.remove(row)
            gone |= {aux.key: aux for aux in edit.released}
    named -= {row.blob for row in [*gone.values(), *lost]}
    strays = [entry for blob, entry in entries.items() if blob not in named and blob not in site.busy()]
    unknown = {entry for entry in strays if _must_stay(site, entry)}
    with site.index.edit() as edit:
        keep_number(site, edit, max((entry.blob.number for entry in unknown if entry.blob), default=0))
    site.delete({entry.blob: entry.nbytes for entry in strays if entry.blob and entry not in unknown})()
    for entry in others:
        if not entry.is_unfinished:
            quarantine(site, entry)
            continue
        with contextlib.suppress(OSError):
            site.blobs.discard(entry)
    if lost or strays:
        words = "after an unclean stop: dropped %d rows without a blob, deleted %d blobs, left %d that cannot be read"
        log.warning(words, len(gone), len(strays) - len(unknown), len(unknown))
    return list(gone.values())


def _linked_rows(view: View) -> Iterator[Row]:
    """All rows. CorruptDataError at one that is not among the children of its parent.

    An entry among the children has no checksum, so that a changed byte in it shows in nothing else.
    """
    for row in view.rows():
        if not is_linked(view, row):
            raise CorruptDataError(f"index: {row.key.hex()[:12]} is not among the children of its parent")
        yield row


def _must_stay(site: Site, entry: Entry) -> bool:
    """Whether a blob has another format version, or keys or this process lack what it takes to tell."""
    assert entry.blob is not None
    try:
        read_block(site.blobs, entry.blob, entry.nbytes, verify=False)
    except (UnknownFormatError, LimitError):
        return True
    except NotFoundError:
        return not site.index.ring.has_folder  # its key may come back
    except CorruptDataError:
        return False
    return False


def _nbytes(entries: Mapping[BlobId, Entry], row: Row) -> int:
    found = entries.get(row.blob)
    if found is None:
        return -1
    # Without its key only the stored size of an encrypted blob is known.
    return row.blob_bytes if row.is_key_missing else found.nbytes


def set_index_aside(place: Place) -> None:
    """Move a damaged index to quarantine. It must not be open."""
    path = place.directory.index / "data.mdb"
    if path.exists():
        place.directory.put_in_quarantine(place.fs, path, f"index-{time.time_ns()}.mdb")
    unlink_quietly(place.fs, [str(place.directory.index / "lock.mdb")])


def check_directory(
    data_dir: Path,
    repair: bool = False,
    master_key: bytes = b"",
    keys_dir: Path | None = None,
    tell: Tell = lambda done, total: None,
) -> CheckReport:
    """Check a data directory offline. Raises DirectoryHeldError if a daemon holds the directory.

    After a repair the directory is in the state of an orderly stop. `tell` hears how many blobs of about how many are
    done.
    """
    if not os.path.isdir(data_dir):
        return CheckReport(findings=[Finding("row", str(data_dir), "there is no such data directory")])
    directory, held = claim(data_dir, keys_dir)
    with held:
        place = Place(directory, held, EngineOptions(0, map_bytes=MAP_BYTES, master_key=master_key), Fs())
        if repair:
            place.tombstones.settle()
        try:
            return _check_offline(place, open_validated(place), repair, tell)
        except CorruptDataError as error:
            found = Finding("row", str(directory.index), str(error))
        if not repair:
            return CheckReport(findings=[found])
        set_index_aside(place)
        report = _check_offline(place, place.open_index(), repair, tell)
        report.findings.insert(0, found)
        report.repaired += 1
        return report


def _check_offline(place: Place, index: Index, repair: bool, tell: Tell) -> CheckReport:
    try:
        report = Walk(place.site(index), repair, tell).run()
        if repair:
            _leave(place, index, report)
        return report
    finally:
        index.close()


def _leave(place: Place, index: Index, report: CheckReport) -> None:
    """Rows and blobs agree now, whatever the last holder promised of them.

    With nothing but blobs of another format there is still no index of them: a start refuses them again.
    """
    unknown = any(finding.kind == "unknown_format" for finding in report.findings)
    find_missing_keys(place.site(index))
    if (len(index.table) or not unknown) and not index.ring.is_missing:
        with index.edit() as edit:
            edit.set_meta(REBUILDING, 0)
    index.sync()
    place.held.write(clean=True, durability="commit", index=digest(place.directory.index / "data.mdb"))
