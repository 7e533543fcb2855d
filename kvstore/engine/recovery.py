"""The index at start: vouched for, opened, made anew where it must be, and in step with the blob folders."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from kvstore.engine.blobs import Fs, unlink_quietly
from kvstore.engine.check import Site, Walk, rebuild, sweep
from kvstore.engine.directory import Directory, Hold, claim
from kvstore.engine.index import INDEX_VERSION, MAP_BYTES, REBUILDING, Index
from kvstore.engine.key_files import find_missing_keys
from kvstore.engine.keyring import KeyRing
from kvstore.engine.ledger import Ballast
from kvstore.engine.nouns import CheckReport, EngineOptions, Finding
from kvstore.engine.pages import demand_whole, digest
from kvstore.engine.tombstones import Tombstones
from kvstore.errors import CorruptDataError, StoreFullError

log = logging.getLogger(__name__)


def recovered_index(
    directory: Directory, hold: Hold, options: EngineOptions, fs: Fs, ring: KeyRing, tombstones: Tombstones
) -> Index:
    """Open the index and, unless the last stop was clean, put it in step; on a full disk the ballast makes room.

    What was deleted and is still on the disk is unlinked first, so that no rebuild finds it.
    """
    try:
        tombstones.settle()
    except OSError as error:
        log.warning("deleted files are still on the disk; the next upkeep tries again: %s", error)
    try:
        return _in_step(directory, hold, options, fs, ring, tombstones)
    except StoreFullError:
        if not Ballast(directory.ballast, 0).drop():
            raise
        return _in_step(directory, hold, options, fs, ring, tombstones)


def _in_step(
    directory: Directory, hold: Hold, options: EngineOptions, fs: Fs, ring: KeyRing, tombstones: Tombstones
) -> Index:
    sync = options.durability != "none"
    try:
        index = open_vouched(directory, hold, fs, ring, sync, options.map_bytes)
    except CorruptDataError as error:
        return _anew(directory, fs, options, ring, tombstones, error)
    site = Site(directory, index, fs, in_flight=tombstones.names, rule=options.rule)
    try:
        with index.view() as view:
            rebuilding = view.meta(REBUILDING)
        unsynced = not hold.previous.get("clean") and hold.previous.get("durability") == "none"
        if unsynced or rebuilding:
            make_anew(site)
        elif index.was_short or not hold.previous.get("clean"):
            sweep(site)
        return index
    except CorruptDataError as error:
        index.close()
        return _anew(directory, fs, options, ring, tombstones, error)
    except BaseException:
        index.close()
        raise


def _anew(
    directory: Directory,
    fs: Fs,
    options: EngineOptions,
    ring: KeyRing,
    tombstones: Tombstones,
    why: CorruptDataError,
) -> Index:
    """An index from blob headers alone; the old one is closed."""
    log.warning("the index is damaged; it goes to quarantine and is made anew from the blobs: %s", why)
    set_index_aside(directory, fs)
    index = Index(directory.index, fs, ring, options.durability != "none", options.map_bytes)
    try:
        make_anew(Site(directory, index, fs, in_flight=tombstones.names, rule=options.rule))
    except BaseException:
        index.close()
        raise
    return index


def open_vouched(directory: Directory, hold: Hold, fs: Fs, ring: KeyRing, sync: bool, map_bytes: int) -> Index:
    """Open the index if it is what the last holder left, or if LMDB can follow every page of it. CorruptDataError.

    UnknownFormatError when a newer kvstore made it.
    """
    path = directory.index / "data.mdb"
    _vouch(path, hold)
    index = Index(directory.index, fs, ring, sync, map_bytes)
    try:
        with index.view() as view:
            # What the engine reads first, read once here, where damage leads to a rebuild.
            _ = view.usage(), view.namespaces(), next(view.newest(), None)
    except BaseException:
        index.close()
        raise
    return index


def _vouch(path: Path, hold: Hold) -> None:
    left = hold.previous.get("index") if hold.previous.get("clean") else None
    if not isinstance(left, str):
        demand_whole(path)
        return
    try:
        found = digest(path)
    except OSError as error:
        raise CorruptDataError(f"{path}: {error}") from error
    if found != left:
        raise CorruptDataError(f"{path} is {'not what the last stop left' if found else 'gone'}")


def make_anew(site: Site) -> CheckReport:
    """Fill the index from blob headers, and say so in it meanwhile: a start that finds the word begins again.

    Without the word, a start after a kill in the middle would take every blob that has no row yet for a stray. It stays
    while keys are missing: the blobs that need them get their rows when the keys are back.
    """
    with site.index.edit() as edit:
        edit.set_meta(REBUILDING, 1)
    report = rebuild(site)
    find_missing_keys(site)
    if not site.index.ring.is_missing:
        _settle(site.index)
    return report


def _settle(index: Index) -> None:
    """All that was being made anew is there now, in today's format."""
    with index.edit() as edit:
        edit.set_meta("version", INDEX_VERSION)
        edit.set_meta(REBUILDING, 0)


def set_index_aside(directory: Directory, fs: Fs) -> None:
    """Move a damaged index to quarantine. It must not be open."""
    path = directory.index / "data.mdb"
    if path.exists():
        directory.put_in_quarantine(fs, path, f"index-{time.time_ns()}.mdb")
    unlink_quietly(fs, [str(directory.index / "lock.mdb")])


def check_directory(
    data_dir: Path, repair: bool = False, master_key: bytes = b"", keys_dir: Path | None = None
) -> CheckReport:
    """Check a data directory that no daemon holds. DirectoryHeldError if one does.

    A repair leaves it as an orderly stop would.
    """
    if not os.path.isdir(data_dir):
        return CheckReport(findings=[Finding("row", str(data_dir), "there is no such data directory")])
    directory, hold = claim(data_dir, keys_dir)
    with hold:
        fs = Fs()
        ring = KeyRing(directory.keys, fs, master_key)
        tombstones = Tombstones(directory, fs)
        if repair:
            tombstones.settle()
        try:
            index = open_vouched(directory, hold, fs, ring, True, MAP_BYTES)
            return _check_offline(index, directory, hold, tombstones, repair)
        except CorruptDataError as error:
            found = Finding("row", str(directory.index), str(error))
        if not repair:
            return CheckReport(findings=[found])
        set_index_aside(directory, fs)
        index = Index(directory.index, fs, ring, True, MAP_BYTES)
        report = _check_offline(index, directory, hold, tombstones, repair)
        report.findings.insert(0, found)
        report.repaired += 1
        return report


def _check_offline(index: Index, directory: Directory, hold: Hold, tombstones: Tombstones, repair: bool) -> CheckReport:
    try:
        site = Site(directory, index, Fs(), in_flight=tombstones.names)
        walk = Walk(site, repair)
        report = walk.run()
        if repair:
            find_missing_keys(site)
            # With nothing but blobs of another format there is still no index of them: a start refuses them again.
            with index.view() as view:
                nothing_known = bool(walk.newer) and not view.count()
            if not (nothing_known or index.ring.is_missing):
                _settle(index)
            index.sync()
            # Rows and blobs agree now, whatever the last holder promised of them.
            hold.write(clean=True, durability="commit", index=digest(directory.index / "data.mdb"))
        return report
    finally:
        index.close()
