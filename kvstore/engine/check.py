"""Checks all blobs and rows in one pass and, if requested, repairs what is damaged. Used by a running engine and by the
offline check (`kvstore.engine.recover`). Blobs of another format version are reported and left alone.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from kvstore.blobs.protocol import Entry
from kvstore.core.blocks import Reason
from kvstore.engine.adopt import (
    Site,
    Strays,
    batched,
    quarantine,
    read_block,
    read_strays,
    require_rule,
    settle_strays,
)
from kvstore.engine.bases import lose, recount
from kvstore.engine.evictions import REPAIR
from kvstore.engine.shared import Shared
from kvstore.errors import CorruptDataError, DirectoryError, KVStoreError, NotFoundError, UnknownFormatError
from kvstore.index.children import is_linked
from kvstore.index.rows import Row
from kvstore.index.table import AUX, CHECKPOINT
from kvstore.index.transaction import KIND_FLAGS, View

FINDINGS_MAX = 1000
Tell: TypeAlias = Callable[[int, int], None]
# Rows that are compared, removed or deleted while the lock is held.
LOCKED_ROWS_MAX = 1024
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong in a data directory. Kinds: missing_blob, stray_blob, corrupt_blob, missing_parent, size, row,
    unknown_format, missing_basis."""

    kind: str
    path: str
    detail: str


@dataclass
class CheckReport:
    """Report of a check: blobs and bytes read, repairs, and the first FINDINGS_MAX findings.

    `removed`: blocks that a repair removed, since they were damaged or came after one that was.
    """

    blobs: int = 0
    bytes: int = 0
    repaired: int = 0
    removed: int = 0
    findings: list[Finding] = field(default_factory=list)


def verify_row(site: Site, row: Row) -> None:
    """Read a row's blob whole; CorruptDataError unless it is exactly what row, checksums and the rule say.

    NotFoundError when it is encrypted and its key is not there, UnknownFormatError for another format version.
    """
    if row.is_key_missing:
        has_folder = site.index.ring.has_folder
        raise NotFoundError(f"the key that it was encrypted with {'was dropped' if has_folder else 'is missing'}")
    # By its own size, so that a blob of another format version is told from a damaged one.
    nbytes = site.blobs.size(row.blob)
    try:
        block, source = read_block(site.blobs, row.blob, row.blob_bytes if nbytes is None else nbytes, verify=True)
    except NotFoundError as error:
        # A readable row without a namespace key is not encrypted, so an encrypted file is in place of a plain one.
        if site.index.ring.key(row.root) is not None:
            raise
        raise CorruptDataError(f"not the block that the index says: {error}") from error
    if source != row.source or replace(block, namespace=b"", origin=None) != row.block:
        raise CorruptDataError("not the block that the index says")
    require_rule(site.rule, block)


def drop_tree(site: Site, row: Row, *, keep_blob: bool) -> list[Row]:
    """Delete a row and its descendants, then their blobs; with `keep_blob` the row's own goes to quarantine.

    Children before parents, some at a time; until none is left, since meanwhile others may be stored.
    """
    removed: list[Row] = []
    n_before = -1
    while len(removed) > n_before:
        n_before = len(removed)
        with site.index.view() as view:
            current = view.row(row.key)
            rows = view.tree(current)[::-1] if current and current.number == row.number else []
        for batch in batched(rows, LOCKED_ROWS_MAX):
            with site.lock:
                gone = _remove(site, batch)
                if keep_blob and row in gone:
                    quarantine(site, row.blob)
                finish = site.delete({each.blob: site.cost(each) for each in gone if not (keep_blob and each == row)})
            finish()
            removed += gone
    return removed


def _remove(site: Site, rows: Sequence[Row]) -> list[Row]:
    """Remove those that are still there and have no children; they and the aux rows that went with them."""
    gone: list[Row] = []
    with site.index.edit() as edit:
        for row in rows:
            current = edit.row(row.key)
            is_same = current is not None and current.number == row.number
            if is_same and not any(edit.stored(child) for child in edit.children(row.key)):
                edit.remove(row)
                gone.append(row)
        return gone + edit.released


class Walk:
    """One check of one site; use once. `removed` collects the rows that a repair deleted."""

    def __init__(self, site: Site, repair: bool, tell: Tell = lambda done, total: None) -> None:
        """`tell` hears how many blobs of about how many are done."""
        self._site = site
        self._repair = repair
        self._say = tell
        self.report = CheckReport()
        self.removed: list[Row] = []

    def run(self) -> CheckReport:
        """Blobs against rows, rows against blobs, strays, totals. CorruptDataError when the index cannot be read."""
        self._check_totals()
        strays = self._check_blobs()
        self._check_rows()
        self._check_strays(strays)
        return self.report

    def _find(self, kind: str, place: str, detail: str) -> None:
        if len(self.report.findings) < FINDINGS_MAX:
            self.report.findings.append(Finding(kind, _readable(place), _readable(detail)))

    def _row(self, key: bytes) -> Row | None:
        with self._site.index.view() as view:
            return view.row(key)

    def _check_blobs(self) -> list[Entry]:
        """Verify every blob that a row names; returns the other entries."""
        strays: list[Entry] = []
        for entry in list(self._site.blobs.names()):
            row = self._row(entry.blob.key) if entry.blob else None
            if row is None or row.blob != entry.blob or entry.is_unfinished:
                strays.append(entry)
                continue
            self.report.blobs += 1
            self.report.bytes += row.blob_bytes
            self._say(self.report.blobs, len(self._site.index.table))
            try:
                verify_row(self._site, row)
            except UnknownFormatError as error:
                self._find("unknown_format", entry.place, str(error))
            except NotFoundError as error:
                if self._site.index.ring.has_folder:
                    self._damaged(row, "shredded", entry.place, str(error))
                else:
                    self._find("key_missing", entry.place, str(error))
            except CorruptDataError as error:
                self._site.require_reach(error)
                self._damaged(row, "corrupt_blob", entry.place, str(error))
        return strays

    def _damaged(self, row: Row, kind: str, place: str, detail: str) -> None:
        """A row whose blob is damaged or gone, or that lost its parent: it goes, with all after it."""
        current = self._row(row.key)
        if current is None or current.number != row.number:
            return
        self._find(kind, place, detail)
        if self._repair:
            log.warning("blob %s is taken out of use, with all after it: %s: %s", row.blob.name, kind, detail)
            drop = lose if row.is_aux else drop_tree
            removed = drop(self._site, row, keep_blob=kind == "corrupt_blob")
            self.removed += removed
            self.report.removed += len(removed)
            self.report.repaired += 1

    def _check_rows(self) -> None:
        with self._site.index.view() as view:
            rows = [(row.key, row.parent, row.root, row.blob) for row in view.rows()]
        for key, parent, root, blob in rows:
            row = self._row(key)
            if row is None or row.blob != blob:
                continue
            if row.is_lost:
                self._find("missing_basis", blob.name, "blocks refer to a basis that is lost: they are misses")
            elif self._site.blobs.size(blob) is None:
                self._site.require_reach(None)
                self._damaged(row, "missing_blob", blob.name, "the index names a blob that does not exist")
            elif parent != root and self._row(parent) is None:
                self._damaged(row, "missing_parent", blob.name, "the block before this one is not in the index")

    def _check_strays(self, entries: Sequence[Entry]) -> None:
        """Check entries without a row. A repair adopts sound, reachable blobs and deletes the others."""
        strays = [entry for entry in entries if self._is_stray(entry)]
        found = read_strays(self._site, strays) if self._repair and strays else None
        bad = set() if found is None else {entry for entry, _ in (*found.unknown, *found.key_missing, *found.corrupt)}
        for entry in strays:
            if entry not in bad:  # these have a finding of their own
                self._find("stray_blob", entry.place, "no row of the index names this blob")
        if found is None:
            return
        self.report.blobs += len(found.sound)
        self.report.bytes += sum(stray.source.nbytes for stray in found.sound)
        self._site.require_reach(None)  # or they are no strays, and not damaged
        self._tell(found)
        self.report.repaired += settle_strays(self._site, found)

    def _tell(self, found: Strays) -> None:
        keyless = "shredded" if self._site.index.ring.has_folder else "key_missing"
        kinds = {"unknown_format": found.unknown, keyless: found.key_missing, "corrupt_blob": found.corrupt}
        for kind, entries in kinds.items():
            for entry, detail in entries:
                self._find(kind, entry.place, detail)
        for entry, detail in found.corrupt:
            log.warning("%s goes to quarantine: %s", _readable(entry.place), _readable(detail))

    def _is_stray(self, entry: Entry) -> bool:
        """Whether an entry is still there, without a row, and nothing is under way with it."""
        blob = entry.blob
        if blob is None:
            return True
        with self._site.lock:
            row = self._row(blob.key)
            if blob in self._site.busy() or (row is not None and row.blob == blob):
                return False
            if entry.is_unfinished:
                return entry in self._site.blobs.names(blob.root)
            return self._site.blobs.size(blob) is not None

    def _check_totals(self) -> None:
        """Whether the table and the children agree with the rows, some at a time; a repair puts right what does not."""
        site, start, wrong = self._site, b"", list[str]()
        while True:
            with site.lock:
                with site.index.view() as view:
                    rows = list(itertools.islice(view.rows(start), LOCKED_ROWS_MAX))
                    odd = {row: why for row in rows if (why := _difference(view, site, row))}
                if odd and self._repair:
                    with site.index.edit() as edit:
                        for row in odd:
                            edit.mend(row, site.cost(row))
            wrong += odd.values()
            if not rows:
                break
            start = rows[-1].key + b"\0"
        wrong += [*self._check_table(), *recount(site, self._repair)]
        self.report.repaired += bool(wrong and self._repair)
        for detail in wrong:
            self._find("row", str(site.index.path), detail)

    def _check_table(self) -> list[str]:
        """Blobs in the table without a row; a repair takes them out."""
        site, wrong = self._site, list[str]()
        with site.lock:
            keys = list(site.index.table)
        for batch in batched(keys, LOCKED_ROWS_MAX):
            with site.lock:
                with site.index.view() as view:
                    lost = [key for key in batch if key in site.index.table and view.stored(key) is None]
                if lost and self._repair:
                    with site.index.edit() as edit:
                        for key in lost:
                            edit.table.drop(key)
            wrong += [f"the table of blobs has {key.hex()[:12]}, which has no row" for key in lost]
        return wrong


def _difference(view: View, site: Site, row: Row) -> str:
    """How table and children differ from a row, in words; empty when they do not."""
    table, space = site.index.table, site.index.spaces.get(row.root)
    expected = {
        "nbytes": site.cost(row),
        "n_tokens": row.n_tokens,
        "depth": row.depth,
        "namespace": space.number if space else -1,
    }
    told = {name: table.value(row.key, name) for name in expected} if row.key in table else {}
    if told != expected or table.value(row.key, "flags") & (CHECKPOINT | AUX) != KIND_FLAGS[row.kind]:
        return f"the table of blobs does not agree with the row of {row.key.hex()[:12]}"
    return "" if is_linked(view, row) else f"{row.key.hex()[:12]} is not among the children of its parent"


def _readable(text: str) -> str:
    """Escape bytes that are not Unicode, as file names may contain: findings are sent as Unicode text."""
    return text.encode(errors="backslashreplace").decode()


# Beside the rows: the first 8 bytes of the next key as a number, 0 between passes; when the last pass ended.
NEXT, DONE_S = "scrub_next", "scrub_done_s"
# Largest burst after a long pause, in seconds of the allowed read rate.
_BURST_S = 2.0
_SAVE_EVERY_S = 600.0
_POSITION_BYTES = 8
_LAST = (1 << 8 * _POSITION_BYTES) - 1


class Scrub:
    """One engine's scrub. One thread at a time; `recheck` moves what is damaged to quarantine."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        with shared.index.view() as view:
            self._next = view.meta(NEXT) or 0
            self.done_s = view.meta(DONE_S) or 0
        self._is_running = self._next > 0
        self._stepped = self._saved = time.monotonic()
        self._spare_bytes = 0.0
        self._has_moved = False
        self.damaged = 0

    def step(self) -> None:
        """Read as many bytes as the time since the last step allows. Raises KVStoreError or OSError of the disk."""
        now, last = time.monotonic(), self._stepped
        self._stepped = now
        rate = self._shared.options.scrub_bytes_per_s
        if not rate or not (self._is_running or self._is_due()):
            return
        self._is_running = True
        self._spare_bytes = min(self._spare_bytes + rate * (now - last), rate * _BURST_S)
        while self._spare_bytes > 0:
            with self._shared.index.view() as view:
                row = next(view.rows(self._next.to_bytes(_POSITION_BYTES, "big")), None)
            if row is None or self._next == _LAST:
                self._end()
                return
            self._has_moved = True
            self.damaged += recheck(self._shared, row.key)
            # Keys are hashes: no two share their first 8 bytes.
            self._next = min(int.from_bytes(row.key[:_POSITION_BYTES], "big") + 1, _LAST)
            self._spare_bytes -= row.blob_bytes
        if now - self._saved >= _SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Keep in the index where the pass is. A failure costs a part of a pass, and is no reason for another."""
        if not self._has_moved:
            return
        self._saved, self._has_moved = time.monotonic(), False
        shared = self._shared
        try:
            with shared.lock, shared.edit() as edit:
                edit.set_meta(NEXT, self._next)
                edit.set_meta(DONE_S, self.done_s)
        except (KVStoreError, OSError) as error:
            log.warning("where the scrub is could not be written: %s", error)

    def _is_due(self) -> bool:
        """Whether the last pass is older than the interval; a clock that was set back makes it due, too."""
        return not 0 <= self._shared.clock() - self.done_s < self._shared.options.scrub_interval_s

    def _end(self) -> None:
        self._next, self._is_running, self._spare_bytes = 0, False, 0.0
        self.done_s = int(self._shared.clock())
        self._has_moved = True
        log.info("every blob was read; %d damaged since the start", self.damaged)
        self.save()


def after_repair(shared: Shared, removed: list[Row]) -> None:
    """Rows changed behind the counters: take them again, and keep quarantine in its bounds."""
    shared.evictions.note(REPAIR, len(removed), sum(map(shared.site.cost, removed)))
    shared.lost.remember(removed, Reason.CORRUPT)
    with contextlib.suppress(OSError):
        shared.blobs.trim_quarantine(shared.options.quarantine_files_max)
    with shared.lock:
        shared.measure()


def recheck(shared: Shared, key: bytes) -> bool:
    """Read a block's blob again; whether it was damaged and is in quarantine now, its descendants deleted.

    What refers to an aux block stays.

    What is of another format version, what has no key and what is in a displaced directory stays.
    """
    with shared.index.view() as view:
        row = view.row(key)
    if row is None or row.is_lost or shared.is_displaced():
        return False
    try:
        verify_row(shared.site, row)
        return False
    except (NotFoundError, UnknownFormatError):
        return False
    except CorruptDataError as error:
        try:
            shared.require_reach(error)
        except DirectoryError:
            return False
        log.warning("blob %s is damaged: %s", row.blob.name, error)
    removed = (lose if row.is_aux else drop_tree)(shared.site, row, keep_blob=True)
    after_repair(shared, removed)
    return bool(removed)
