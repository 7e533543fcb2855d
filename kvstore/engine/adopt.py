"""Adopts blobs without an index row: reads and verifies them, and adds rows. Used by index rebuilds and repairs."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import xxhash

from kvstore.blobs import format as blob_format
from kvstore.blobs.protocol import BlobId, BlobReader, Blobs, Entry, Source
from kvstore.core.blocks import BLOCK_TOKENS, Block, Origin, count_tokens
from kvstore.core.keys import NamespaceInfo
from kvstore.core.layers import Layout
from kvstore.core.rules import check_block
from kvstore.errors import CorruptDataError, DirectoryError, KVStoreError, LimitError, NotFoundError, UnknownFormatError
from kvstore.index.children import is_covered, replaced_by
from kvstore.index.index import Index
from kvstore.index.rows import Row, pack_row
from kvstore.index.table import origin_flags
from kvstore.index.transaction import Edit

VERIFY_BYTES = 1 << 20
# Rows added in one commit.
ADOPTED_MAX = 1024
NEXT_NUMBER = "next_number"
# Errors caused by this process's limits, not by the blob.
_LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
log = logging.getLogger(__name__)


T = TypeVar("T")
Rule: TypeAlias = Callable[[Layout, Block], None]


@dataclass
class Site:
    """The store that a check or rebuild works on. `rule` raises CorruptDataError for a block that no engine could use.

    `busy`: blobs that have no row for a good reason, such as those being written; ask it under `lock`.
    `delete` takes blobs without a row, with their bytes on disk: from then on they are busy. The function that it
    returns deletes them, without the lock, so that no crash brings them back, and logs what the disk refuses.
    `numbered` is told, under `lock`, the number of every blob that gets a row or stays without one: no other gets it.
    `require_reach` raises DirectoryError when what cannot be read (with the error that says so) is out of reach instead
    of damaged: the volume is away, or the disk answers nothing.
    """

    blobs: Blobs
    index: Index
    busy: Callable[[], Container[BlobId]]
    delete: Callable[[Mapping[BlobId, int]], Callable[[], None]]
    lock: threading.RLock = field(default_factory=threading.RLock)
    numbered: Callable[[int], None] = lambda number: None
    rule: Rule = check_block
    require_reach: Callable[[CorruptDataError | None], None] = lambda error: None
    clock: Callable[[], float] = time.time

    def cost(self, row: Row) -> int:
        """Bytes on disk of a row's blob."""
        return 0 if row.is_lost else self.blobs.stored_bytes(row.root, row.blob_bytes)


@dataclass(frozen=True, slots=True)
class Stray:
    """A blob without a row, verified."""

    block: Block
    entry: Entry
    source: Source


@dataclass
class Strays:
    """Entries without a row, by what they are; each with the reason why it is no sound blob."""

    sound: list[Stray] = field(default_factory=list)
    corrupt: list[tuple[Entry, str]] = field(default_factory=list)
    key_missing: list[tuple[Entry, str]] = field(default_factory=list)
    unknown: list[tuple[Entry, str]] = field(default_factory=list)
    unfinished: list[Entry] = field(default_factory=list)


def read_block(blobs: Blobs, blob: BlobId, nbytes: int, *, verify: bool) -> tuple[Block, Source]:
    """(block, where its payload is) of a blob; with `verify` its payload checked against all checksums.

    Raises CorruptDataError, also when it cannot be read; UnknownFormatError for another format version; NotFoundError
    when it is encrypted and its key is not there; LimitError when it is this process that lacks descriptors or memory.
    """
    try:
        with contextlib.closing(blobs.reader([Source(blob, 0, nbytes)], 1)) as reader:
            length = blob_format.header_length(_bytes(reader, 0, min(blob_format.LENGTH_BYTES, nbytes)), nbytes)
            block = blob_format.parse_header(_bytes(reader, 0, length), nbytes)
            if verify:
                _verify_payload(reader, block, length)
            return block, Source(blob, length, nbytes)
    except CorruptDataError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _LACKING:
            raise LimitError(f"{blob.name} cannot be read now: {error}") from error
        raise


def quarantine(site: Site, what: Entry | BlobId) -> bool:
    """Move a damaged blob out of the way; whether that went well. Else it stays without a row, and the log says why.

    Its row goes all the same: damage that is served as a miss again and again helps no one.
    """
    try:
        site.blobs.quarantine(what)
    except (DirectoryError, OSError) as error:
        log.warning("a damaged blob could not be put in quarantine; `check --repair` will find it: %s", error)
        return False
    return True


def require_own_namespace(block: Block) -> NamespaceInfo:
    """The namespace that a block says it belongs to. CorruptDataError when its chain is another's."""
    info = NamespaceInfo.from_record(block.namespace)
    if info.root != block.root:
        raise CorruptDataError("the blob is not what its namespace says")
    return info


def require_rule(rule: Rule, block: Block) -> None:
    """CorruptDataError for a block that breaks the rule. One in a recipe that this build does not know is left."""
    with contextlib.suppress(UnknownFormatError):
        rule(NamespaceInfo.from_record(block.namespace).layout, block)


def _bytes(reader: BlobReader, offset: int, nbytes: int) -> bytes:
    view = bytearray(nbytes)
    reader.readinto(0, offset, [memoryview(view)])
    return bytes(view)


def _verify_payload(reader: BlobReader, block: Block, payload_offset: int) -> None:
    memory = memoryview(bytearray(VERIFY_BYTES))
    for offset, length, checksum in blob_format.checked_ranges(block):
        hasher = xxhash.xxh3_64()
        for at in range(0, length, VERIFY_BYTES):
            part = memory[: min(VERIFY_BYTES, length - at)]
            reader.readinto(0, payload_offset + offset + at, [part])
            hasher.update(part)
        if hasher.intdigest() != checksum:
            raise CorruptDataError(f"blob: bytes {offset} to {offset + length} do not match their checksum")


def read_strays(site: Site, entries: Iterable[Entry]) -> Strays:
    """Read entries without a row, each blob whole. LimitError as `read_block`."""
    found = Strays()
    for entry in entries:
        if entry.is_unfinished:
            found.unfinished.append(entry)
            continue
        try:
            found.sound.append(_read_stray(site, entry))
        except UnknownFormatError as error:
            found.unknown.append((entry, str(error)))
        except NotFoundError as error:
            found.key_missing.append((entry, str(error)))
        except CorruptDataError as error:
            found.corrupt.append((entry, str(error)))
    return found


def _read_stray(site: Site, entry: Entry) -> Stray:
    if entry.blob is None:
        raise CorruptDataError("not a name of a blob")
    block, source = read_block(site.blobs, entry.blob, entry.nbytes, verify=True)
    if (block.root, block.key) != entry.blob[:2]:
        raise CorruptDataError("the blob is not what its name says")
    require_own_namespace(block)
    require_rule(site.rule, block)
    return Stray(block, entry, source)


def adopt(site: Site, sound: Iterable[Stray]) -> tuple[list[BlobId], list[BlobId]]:
    """Give rows to sound blobs whose parents have one. Returns (those that others cover, those that nothing leads to).

    Aux blocks and parents first; of equals the highest rank, then the longest. Their order of use is that of their
    creation, after all that is there. When they were last used is not known, so idle times, TTLs and orphans count from
    now: by their creation, prompts that are in use daily would expire. Neither kind returned has a row; deleting is the
    caller's.
    """
    unwanted: list[BlobId] = []
    orphans: list[BlobId] = []
    order = sorted(
        sound,
        key=lambda s: (
            s.block.aux is None,
            s.block.start,
            -s.block.fidelity,
            -count_tokens(s.block.tokens),
            s.entry.place,
        ),
    )
    created = sorted({stray.block.created_s for stray in order})
    now_s = int(site.clock())
    moments = {created_s: site.index.table.sequence + 1 + at for at, created_s in enumerate(created)}
    for at in range(0, len(order), ADOPTED_MAX):
        with site.lock, site.index.edit() as edit:
            for stray in order[at : at + ADOPTED_MAX]:
                blob = stray.source.blob
                row = pack_row(stray.block, blob.number, *stray.source[1:])
                if not _is_reachable(edit, row):
                    orphans.append(blob)
                    continue
                if is_covered(edit, row):
                    unwanted.append(blob)
                    continue
                edit.put_namespace(row.root, stray.block.namespace, now_s)
                unwanted += _put(site, edit, row)
                origin = stray.block.origin or Origin()
                flags = origin_flags(origin)
                edit.table.stamp(row.key, now_s, last_use=moments[row.created_s], flags=flags, error=origin.error)
                keep_number(site, edit, blob.number)
            unwanted += [aux.blob for aux in edit.released if not aux.is_lost]
    return unwanted, orphans


def _put(site: Site, edit: Edit, row: Row) -> list[BlobId]:
    """A row in the place of those that it replaces; their blobs. What they refer to stays if the new one needs it."""
    replaced = replaced_by(edit, row)
    same = next((old for old in replaced if old.key == row.key), None)
    if same is not None:
        edit.replace(same, row, site.cost(row))
    else:
        edit.put(row, site.cost(row))
    for old in replaced:
        if old is not same:
            edit.remove(old, by=row)
    return [old.blob for old in replaced if not old.is_lost]


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of at most `size`."""
    remaining = iter(items)
    return iter(lambda: list(itertools.islice(remaining, size)), [])


def keep_number(site: Site, edit: Edit, number: int) -> None:
    """A blob has this number: later ones get others."""
    edit.set_meta(NEXT_NUMBER, max(edit.meta(NEXT_NUMBER) or 0, number + 1))
    site.numbered(number)


def _is_reachable(edit: Edit, row: Row) -> bool:
    if row.parent == row.root:
        return row.start == 0
    parent = edit.row(row.parent)
    return parent is not None and parent.n_tokens == BLOCK_TOKENS and parent.end == row.start


def find_missing_keys(site: Site) -> None:
    """Whether encrypted blobs are there and the folder of their keys is not: then the ring makes no new ones."""
    ring = site.index.ring
    is_missing = False
    if not ring.has_folder:
        with site.index.view() as view:
            is_missing = any(view.is_unreadable(root) for root in list(site.index.spaces))
            if not is_missing and sum(1 for _ in site.blobs.names()) != view.count():
                named = {row.blob for row in view.rows()}
                is_missing = any(
                    _is_unreadable_blob(site, entry.blob, entry.nbytes)
                    for entry in site.blobs.names()
                    if entry.blob is not None and entry.blob not in named
                )
    was_missing, ring.is_missing = ring.is_missing, is_missing
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


def settle_strays(site: Site, found: Strays) -> int:
    """Adopt sound blobs, delete unwanted ones, quarantine damaged ones. Returns the number of entries handled.

    Not touched: blobs of another format version, blobs that may be descendants of one, and encrypted blobs while the
    key folder is missing.
    """
    unwanted, orphans = adopt(site, found.sound)
    keyless = [entry.blob for entry, _ in found.key_missing if entry.blob]
    gone = keyless if site.index.ring.has_folder else []
    left = [entry.blob for entry, _ in found.unknown if entry.blob]
    left += orphans if found.unknown else []
    left += [] if gone else keyless
    if left:
        with site.lock, site.index.edit() as edit:
            keep_number(site, edit, max(blob.number for blob in left))
    for batch in batched([*unwanted, *gone, *(orphans if not found.unknown else ())], ADOPTED_MAX):
        site.delete({blob: site.blobs.stored_bytes(blob.root, site.blobs.size(blob) or 0) for blob in batch})()
    with contextlib.suppress(OSError):
        for entry in found.unfinished:
            site.blobs.discard(entry)
    moved = sum(quarantine(site, entry) for entry, _ in found.corrupt)
    settled = len(found.sound) + len(gone) + len(found.unfinished) + moved
    return settled - (len(orphans) if found.unknown else 0)
