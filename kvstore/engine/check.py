"""One walk over blobs and rows that finds what is wrong and, if asked, puts it right.

It serves a running engine, the offline check (`kvstore.engine.recovery`), and a start-up that must rebuild the index
from blob headers (an empty index makes every blob a stray, and sound strays are adopted). `sweep` is the light form for
a start after an unclean stop under synced commits: what has a row has its bytes, so only strays and missing files are
looked for. What a newer kvstore wrote is reported and left alone by all of them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from kvstore.blocks import BLOCK_TOKENS, Block, count_tokens
from kvstore.engine.blobs import TMP_SUFFIX, Fs, parse_name, unlink_quietly
from kvstore.engine.directory import Directory
from kvstore.engine.index import Edit, Index, Usage, View
from kvstore.engine.keyring import KeyRing
from kvstore.engine.matching import is_covered, replaced_by
from kvstore.engine.nouns import CheckReport, Finding, Slice
from kvstore.engine.reading import demand_same, is_misnumbered, read_block, sources_of
from kvstore.engine.rows import Row, pack_row
from kvstore.errors import (
    CorruptDataError,
    DirectoryError,
    LimitError,
    NotFoundError,
    UnknownFormatError,
)
from kvstore.keys import NamespaceInfo
from kvstore.layers import Layout
from kvstore.rules import check_block

FINDINGS_MAX = 1000
SWEEP_ROWS = 4096
# No store counts so far. A file that somebody named so would use up the numbers of all that come after it.
SEQ_END = 1 << 62
log = logging.getLogger(__name__)


Rule: TypeAlias = Callable[[Layout, Block], None]


def _none_in_flight() -> Container[str]:
    return frozenset()


def _no_counter(seq: int) -> None:
    """Nobody counts: the index alone knows the next seq."""


@dataclass
class Site:
    """What a walk works on. `in_flight` names files that have no row for a good reason; ask it under `lock`.

    `rule` raises CorruptDataError for a block that no engine could go on from, though all its checksums are right.

    `adopted` is told, under `lock`, the seq of every file that gets a row or stays without one: no other file gets it.
    """

    directory: Directory
    index: Index
    fs: Fs
    lock: threading.RLock = field(default_factory=threading.RLock)
    in_flight: Callable[[], Container[str]] = _none_in_flight
    adopted: Callable[[int], None] = _no_counter
    rule: Rule = check_block

    def condemn(self, path: Path) -> bool:
        """Put a damaged file in quarantine; whether that went well. Else it stays without a row, and the log says why.

        Its row goes all the same: damage that is served as a miss again and again helps nobody.
        """
        try:
            self.directory.put_in_quarantine(self.fs, path)
        except (DirectoryError, OSError) as error:
            log.warning("a damaged blob could not be put in quarantine; `check --repair` will find it: %s", error)
            return False
        return True


def verify_row(site: Site, row: Row) -> None:
    """Read a row's blob whole; CorruptDataError unless it is exactly what row, checksums and the rule say.

    NotFoundError when it is encrypted and its key was dropped, UnknownFormatError when a newer kvstore wrote it.
    """
    directory, ring = site.directory, site.index.ring
    path = directory.path(row)
    if row.is_sealed:
        raise NotFoundError(
            f"{path}: the key that it was encrypted with {'was dropped' if ring.has_folder else 'is missing'}"
        )
    try:
        block, payload_offset, file_bytes = read_block(path, verify=True, ring=ring)
    except UnknownFormatError as error:
        [source] = sources_of(directory, [Slice(row, 0)])
        if is_misnumbered(source, row, ring.key(row.root)):
            raise CorruptDataError(f"{path}: {error}") from error
        raise
    except NotFoundError as error:
        # The row could be read, so its key is there: the file names another.
        raise CorruptDataError(f"{path}: {error}") from error
    if (payload_offset, file_bytes) != (row.payload_offset, row.file_bytes):
        raise CorruptDataError(f"{path}: not the size that the index says")
    demand_same(block, row)
    _demand_rule(site, block)


def _demand_rule(site: Site, block: Block) -> None:
    """CorruptDataError for a block that breaks the rule. One in a recipe that only a newer kvstore knows is left."""
    with contextlib.suppress(UnknownFormatError):
        site.rule(_layout_of(block.namespace), block)


@functools.lru_cache(64)
def _layout_of(namespace: bytes) -> Layout:
    return NamespaceInfo.from_record(namespace).layout


class Walk:
    """One check of one site; use once. `removed` collects the rows that a repair deleted."""

    def __init__(self, site: Site, repair: bool) -> None:
        self._site = site
        self._repair = repair
        self.report = CheckReport()
        self.removed: list[Row] = []
        self.newer: list[tuple[Path, str]] = []
        self._keyless: list[Path] = []

    def run(self) -> CheckReport:
        """Files against rows, rows against files, strays, totals. CorruptDataError when the index cannot be read."""
        strays = self._check_files()
        self._check_rows()
        self._check_strays(strays)
        self._check_totals()
        return self.report

    def _find(self, kind: str, path: Path | str, detail: str) -> None:
        if len(self.report.findings) < FINDINGS_MAX:
            self.report.findings.append(Finding(kind, _readable(str(path)), _readable(detail)))

    def _row(self, key: bytes) -> Row | None:
        with self._site.index.view() as view:
            return view.row(key)

    def _check_files(self) -> list[tuple[int, Path]]:
        """Verify every file that a row names; returns the others."""
        strays: list[tuple[int, Path]] = []
        for number, entry in list(self._site.directory.blob_files()):
            path = Path(entry.path)
            named = parse_name(entry.name)
            row = self._row(named[0]) if named else None
            if row is None or self._site.directory.path(row) != path:
                strays.append((number, path))
                continue
            self.report.blobs += 1
            self.report.bytes += row.file_bytes
            try:
                verify_row(self._site, row)
            except UnknownFormatError as error:
                self._find("unknown_format", path, str(error))
            except NotFoundError as error:
                if self._site.index.ring.has_folder:
                    self._damaged(row, "shredded", str(error))
                else:
                    self._find("key_missing", path, str(error))
            except CorruptDataError as error:
                self._damaged(row, "corrupt_blob", str(error))
        return strays

    def _damaged(self, row: Row, kind: str, detail: str) -> None:
        """A row whose file is damaged or gone, or that lost its parent: it goes, with all after it."""
        with self._site.lock:
            current = self._row(row.key)
            if current is None or current.seq != row.seq:
                return
            self._find(kind, self._site.directory.path(row), detail)
            if self._repair:
                self.removed += drop_tree(self._site, row, quarantine=kind == "corrupt_blob")
                self.report.repaired += 1

    def _check_rows(self) -> None:
        with self._site.index.view() as view:
            rows = [(row.key, row.parent, row.root, self._site.directory.path(row)) for row in view.rows()]
        for key, parent, root, path in rows:
            row = self._row(key)
            if row is None or self._site.directory.path(row) != path:
                continue
            if not path.exists():
                self._damaged(row, "missing_blob", "the index names a file that does not exist")
            elif parent != root and self._row(parent) is None:
                self._damaged(row, "missing_parent", "the block before this one is not in the index")

    def _check_strays(self, strays: list[tuple[int, Path]]) -> None:
        """Files without a row. A repair adopts what is sound and reachable, parents first, and unlinks the rest."""
        sound: list[tuple[Block, int, Path, int, int]] = []
        for number, path in strays:
            with self._site.lock:
                if not self._is_stray(path):
                    continue
                self._find("stray_blob", path, "no row of the index names this file")
            if not self._repair:
                continue
            self.report.repaired += 1
            if _is_unfinished(path):
                unlink_quietly(self._site.fs, [str(path)])
                continue
            try:
                block, payload_offset, file_bytes = self._read_stray(path)
            except UnknownFormatError as error:
                self.report.repaired -= 1
                self._find("unknown_format", path, str(error))
                self.newer.append((path, str(error)))
            except NotFoundError as error:
                if self._site.index.ring.has_folder:
                    self._find("shredded", path, str(error))
                    unlink_quietly(self._site.fs, [str(path)])
                else:
                    self.report.repaired -= 1
                    self._find("key_missing", path, str(error))
                    self._keyless.append(path)
            except CorruptDataError as error:
                self._find("corrupt_blob", path, str(error))
                self.report.repaired -= not self._site.condemn(path)
            else:
                sound.append((block, number, path, payload_offset, file_bytes))
        sound.sort(key=lambda each: (each[0].start, -each[0].fidelity, -count_tokens(each[0].tokens), each[2].name))
        for at in range(0, len(sound), FINDINGS_MAX):
            self._adopt(sound[at : at + FINDINGS_MAX])
        self._leave([*self._keyless, *(path for path, _ in self.newer)])

    def _leave(self, paths: list[Path]) -> None:
        """Of blobs that stay without a row: none of ours gets the name of one, and with it its place."""
        seqs = [_seq_of(path) for path in paths]
        if seqs:
            with self._site.lock:
                with self._site.index.edit() as edit:
                    _skip_seqs(edit, seqs)
                self._site.adopted(max(seqs))

    def _is_stray(self, path: Path) -> bool:
        if path.name.removesuffix(TMP_SUFFIX) in self._site.in_flight() or not os.path.lexists(path):
            return False
        named = parse_name(path.name)
        row = self._row(named[0]) if named else None
        return row is None or self._site.directory.path(row) != path

    def _read_stray(self, path: Path) -> tuple[Block, int, int]:
        named = named_by_us(path)
        if named is None:
            raise CorruptDataError("not a name of a blob")
        block, payload_offset, file_bytes = read_block(path, verify=True, ring=self._site.index.ring)
        self.report.blobs += 1
        self.report.bytes += file_bytes
        if block.key != named[0] or NamespaceInfo.from_record(block.namespace).root != block.root:
            raise CorruptDataError("the blob is not what its name or namespace says")
        _demand_rule(self._site, block)
        return block, payload_offset, file_bytes

    def _adopt(self, sound: list[tuple[Block, int, Path, int, int]]) -> None:
        unwanted: list[Path] = []
        orphans: list[Path] = []
        with self._site.lock:
            with self._site.index.edit() as edit:
                for block, number, path, payload_offset, file_bytes in sound:
                    seq = _seq_of(path)
                    row = pack_row(replace(block, namespace=b""), number, seq, payload_offset, file_bytes)
                    if not _is_reachable(edit, row):
                        orphans.append(path)
                        continue
                    if is_covered(edit, row):
                        unwanted.append(path)
                        continue
                    for old in replaced_by(edit, row):
                        edit.remove(old)
                        unwanted.append(self._site.directory.path(old))
                    edit.put(row, path.stat().st_mtime_ns // 1000)
                    edit.put_namespace(block.root, block.namespace)
                    _skip_seqs(edit, [seq])
                    self._site.adopted(seq)
            # The block before one of these may be a newer kvstore's, which will find them.
            unlink_quietly(self._site.fs, map(str, unwanted if self.newer else unwanted + orphans))
        if self.newer:
            self.report.repaired -= len(orphans)
            self._leave(orphans)

    def _check_totals(self) -> None:
        """Whether what is kept beside the rows agrees with them."""
        with self._site.lock:
            with self._site.index.view() as view:
                self._compare_totals(view)
            if self._repair and self.report.findings:
                with self._site.index.edit() as edit:
                    edit.reindex()

    def _compare_totals(self, view: View) -> None:
        totals: dict[bytes, Usage] = {}
        for row in view.rows():
            totals[row.root] = totals.get(row.root, Usage()).plus(row, +1)
        if totals != {root: usage for root, usage in view.usage().items() if usage != Usage()}:
            self._find("size", self._site.index.path, "the counters do not agree with the rows")
            self.report.repaired += self._repair
        checkpoints = sum(usage.checkpoints for usage in totals.values())
        if view.count("checkpoints") != checkpoints:
            self._find("row", self._site.index.path, f"{checkpoints} checkpoints and their order do not agree")
            self.report.repaired += self._repair
        counts = {name: view.count(name) for name in ("rows", "children", "order", "access")}
        if len(set(counts.values())) > 1:
            self._find("row", self._site.index.path, f"rows and their order do not agree: {counts}")
            self.report.repaired += self._repair


def named_by_us(path: Path | str) -> tuple[bytes, int] | None:
    """(key, seq) of a name that a kvstore may have given."""
    named = parse_name(os.path.basename(path))
    return named if named and named[1] < SEQ_END else None


def _seq_of(path: Path | str) -> int:
    named = named_by_us(path)
    return named[1] if named else 0


def _skip_seqs(edit: Edit, seqs: Iterable[int]) -> None:
    """Files have these numbers: later ones get others."""
    edit.set_meta("next_seq", max([edit.meta("next_seq") or 0, *(seq + 1 for seq in seqs)]))


def _readable(text: str) -> str:
    """With what is not Unicode, as the name of a file may be, spelled out: findings go over the wire."""
    return text.encode(errors="backslashreplace").decode()


def _is_unfinished(path: Path) -> bool:
    """Whether this is a blob that was being written at a kill: nobody was told of it, and nobody need look at it."""
    named = parse_name(path.name.removesuffix(TMP_SUFFIX))
    return path.name.endswith(TMP_SUFFIX) and named is not None and path.is_file() and not path.is_symlink()


def _is_reachable(edit: Edit, row: Row) -> bool:
    if row.parent == row.root:
        return row.start == 0
    parent = edit.row(row.parent)
    return parent is not None and parent.n_tokens == BLOCK_TOKENS and parent.start + BLOCK_TOKENS == row.start


def drop_tree(site: Site, row: Row, quarantine: bool) -> list[Row]:
    """Delete a row and its descendants, then their files; the row's own goes to quarantine if asked. Holds the lock."""
    with site.lock:
        with site.index.edit() as edit:
            current = edit.row(row.key)
            removed = edit.remove_tree(current) if current and current.seq == row.seq else []
        for gone in removed:
            if quarantine and gone.key == row.key:
                site.condemn(site.directory.path(gone))
            else:
                unlink_quietly(site.fs, [str(site.directory.path(gone))])
        return removed


def sweep(site: Site) -> None:
    """After an unclean stop under synced commits: unlink files without a row, drop rows without their file."""
    sizes = {entry.path: entry.stat(follow_symlinks=False).st_size for _, entry in site.directory.blob_files()}
    with site.index.view() as view:
        lost = [row for row in view.rows() if sizes.get(str(site.directory.path(row))) != row.file_bytes]
        doomed = {row.key: row for gone in lost for row in reversed(view.tree(gone))}
    # Children before parents, a batch a commit: a million rows do not fit in one transaction.
    for batch in batched(doomed.values(), SWEEP_ROWS):
        with site.index.edit() as edit:
            for row in batch:
                edit.remove(row)
    strays = sizes.keys() - named_files(site)
    newer = {path for path in strays if is_newer(path, site.index.ring)}
    with site.index.edit() as edit:
        edit.reindex()
        _skip_seqs(edit, [row.seq for row in edit.rows()] + [_seq_of(path) for path in newer])
    unlink_quietly(site.fs, strays - newer)
    if lost or strays:
        words = "after an unclean stop: dropped %d rows without a file, unlinked %d files, left %d of a newer format"
        log.warning(words, len(lost), len(strays - newer), len(newer))


def named_files(site: Site) -> set[str]:
    """The files that rows name."""
    with site.index.view() as view:
        return {str(site.directory.path(row)) for row in view.rows()}


def is_newer(path: str, ring: KeyRing) -> bool:
    """Whether a newer kvstore wrote a blob, or nobody can tell now."""
    try:
        if named_by_us(path):
            read_block(Path(path), verify=False, ring=ring)
    except (UnknownFormatError, LimitError):
        return True
    except (CorruptDataError, NotFoundError):
        return False
    return False


def batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Lists of at most `size`."""
    remaining = iter(rows)
    return iter(lambda: list(itertools.islice(remaining, size)), [])


def rebuild(site: Site) -> CheckReport:
    """Make the index anew from blob headers, verifying every checksum. UnknownFormatError for a newer blob."""
    with site.index.edit() as edit:
        edit.clear()
    walk = Walk(site, repair=True)
    report = walk.run()
    if walk.newer:
        path, detail = walk.newer[0]
        raise UnknownFormatError(f"{path}: {detail}")
    if report.blobs:
        log.warning("the index was rebuilt from %d blobs", report.blobs)
    return report
