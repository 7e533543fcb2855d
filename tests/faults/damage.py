"""Damage at rest: blobs flipped, cut, swapped and exchanged in every region; index pages flipped, swapped, lost.

Blobs are read as a fetch reads them: existence and size (`first_unusable`), then the ranges that the index names,
against the checksums that it has. Whatever passes must be right; whatever does not is reported as clients report it
(`recheck`). A damaged blob must be in quarantine after the first fetch that meets it, and a miss with a reason. No
fetch reads the header of a plain blob: damage there must be in quarantine after a check with repair. A blob of another
format version must be told by a check, and stay where it is.
A damaged index is opened in a process of its own, since LMDB would take that process with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from kvstore.blobs.encrypted import CHUNK_BYTES, HEADER_BYTES, TAG_BYTES
from kvstore.blobs.format import (
    ENCRYPTED_FORMAT,
    NO_HEADER,
    checked_ranges,
    header_length,
    parse_header,
    require_version,
)
from kvstore.core.blocks import TOKEN_BYTES, Reason, pack_tokens
from kvstore.core.keys import Chain
from kvstore.engine import Engine, Row, Slice, check_directory
from kvstore.errors import CorruptDataError, KVStoreError, UnknownFormatError
from tests.faults.workload import MIXED, NS
from tests.support.engine import (
    blob_path,
    blob_paths,
    namespace,
    options,
    put,
    put_checkpoint,
    require_right,
    sequence,
    state_values,
    values,
)

# Encrypted, where there is a master key.
MASTER, SECRET = bytes(range(32)), namespace("secret")
TOKENS, OTHER, MIXED_TOKENS = list(range(700)), list(range(9000, 9400)), list(range(5000, 5400))
_TIMEOUT_S = 60
_PAGE = 4096
Change = Callable[[bytearray], bytes]
# (namespace, tokens, whether they are fetched up to a checkpoint)
FETCHES = ((NS, TOKENS, False), (NS, OTHER, False), (MIXED, MIXED_TOKENS, True))
SECRET_FETCHES = ((SECRET, TOKENS, False),)


def prepare(data_dir: Path) -> None:
    """Two namespaces, with blocks, tails and a checkpoint, stopped in order."""
    with Engine.open(data_dir, options()) as engine:
        for number in range(12):
            put(engine, namespace("many"), range(number * 1000, number * 1000 + 40))
        store_all(engine)


def store_all(engine: Engine) -> None:
    """What is damaged is stored again."""
    for ns, tokens, _ in FETCHES:
        assert put(engine, ns, tokens).reason is Reason.OK
    assert put_checkpoint(engine, MIXED, MIXED_TOKENS).reason is Reason.OK


# -- blobs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Region:
    """Part of a blob file."""

    name: str
    start: int
    end: int


def regions(path: Path) -> list[Region]:
    """Length, JSON, record with tokens and recipes, padding, and every checked range of a blob."""
    data = path.read_bytes()
    if ENCRYPTED_FORMAT.encode() in data[:HEADER_BYTES]:
        return _encrypted_regions(data)
    payload_offset = header_length(data[:8], len(data))
    header = data[:payload_offset]
    block = parse_header(header, len(data))
    record = header.index(b'"record":"') + 10
    record_end = header.index(b'"', record)
    text_end = len(header.rstrip(b" "))
    found = [
        Region("header length", 0, 8),
        Region("header", 8, record),
        Region("record", record, record_end),
        Region("tensor table", record_end, text_end),
        Region("header padding", text_end, payload_offset),
    ]
    found += [
        Region(f"tensor {number}", payload_offset + offset, payload_offset + offset + length)
        for number, (offset, length, _) in enumerate(checked_ranges(block))
    ]
    return [region for region in found if region.end > region.start]


def _encrypted_regions(data: bytes) -> list[Region]:
    """Length, JSON, padding, and every chunk with its tag of an encrypted blob; the first chunks hold the header."""
    text_end = len(data[:HEADER_BYTES].rstrip(b" "))
    found = [
        Region("outer length", 0, 8),
        Region("outer header", 8, text_end),
        Region("outer padding", text_end, HEADER_BYTES),
    ]
    for at in range(HEADER_BYTES, len(data), CHUNK_BYTES + TAG_BYTES):
        end = min(at + CHUNK_BYTES + TAG_BYTES, len(data))
        found += [Region("chunk", at, end - TAG_BYTES), Region("tag", end - TAG_BYTES, end)]
    return found


def _flip(at: int, bit: int) -> Change:
    def change(data: bytearray) -> bytes:
        data[at] ^= 1 << bit
        return bytes(data)

    return change


def _replaced(at: int, new: bytes) -> Change:
    return lambda data: bytes(data[:at] + new + data[at + len(new) :])


def blob_changes(path: Path, flips: int, seed: int) -> Iterator[tuple[str, Change]]:
    """Every kind of damage to one blob, with so many flips in each region."""
    chosen = random.Random(seed)
    size = path.stat().st_size
    for region in regions(path):
        for _ in range(flips):
            yield f"flip in {region.name}", _flip(chosen.randrange(region.start, region.end), chosen.randrange(8))
        yield f"cut before {region.name}", lambda data, at=region.start: bytes(data[:at])
        middle = chosen.randrange(region.start, region.end)
        yield f"cut in {region.name}", lambda data, at=middle: bytes(data[:at])
        yield f"zeros in {region.name}", _replaced(region.start, bytes(region.end - region.start))
    yield "longer", lambda data: bytes(data) + b"\0"
    yield "noise", lambda data: random.Random(seed).randbytes(size)
    for number in (b"0", b"2", b"9"):
        yield "another version", lambda data, to=number: _renumbered(data, to)


def _renumbered(data: bytearray, version: bytes) -> bytes:
    return re.sub(rb'"version":"[0-9]"', b'"version":"' + version + b'"', bytes(data))


def _is_of_another_version(data: bytes) -> bool:
    """Whether a whole header says that it is of a format that this kvstore does not read."""
    try:
        require_version(json.loads(data[8 : header_length(data[:8], len(data))])["__metadata__"])
    except UnknownFormatError:
        return True
    except (CorruptDataError, *NO_HEADER):
        return False
    return False


class Blobs:
    """One engine whose blobs are damaged one after the other, and stored again."""

    def __init__(self, data_dir: Path) -> None:
        prepare(data_dir)
        self._engine = Engine.open(data_dir, options(quarantine_files_max=4, master_key=MASTER))
        self._store_all()

    def close(self) -> None:
        """Stop in order."""
        self._engine.close()

    def rows(self) -> list[Row]:
        """The blobs that are damaged: those of the sequences, not of the many."""
        many = namespace("many").root
        rows = [info.row for info in self._engine.list_blocks(limit=1 << 20) if info.row.root != many]
        return sorted(rows, key=lambda row: row.key)

    def path(self, row: Row) -> Path:
        """The file of a row."""
        return blob_path(self._engine, row)

    def strike(self, key: bytes, change: Change) -> list[str]:
        """Damage the blob of a key, read everything as clients do, repair, store again; what was wrong."""
        row = next(row for row in self.rows() if row.key == key)
        path = blob_path(self._engine, row)
        whole = path.read_bytes()
        changed = change(bytearray(whole))
        path.write_bytes(changed)
        if _is_of_another_version(changed):
            return self._after_another_version(path, whole)
        at = row.payload_offset
        is_met = row.root == SECRET.root or len(changed) != len(whole) or changed[at:] != whole[at:]
        return self._after([row] if changed != whole else [], is_met)

    def _after_another_version(self, path: Path, whole: bytes) -> list[str]:
        """A check tells of it; a fetch, a recheck and a repair leave it as it is. Then its bytes are put back."""
        wrong, changed = self._read_all(), path.read_bytes()
        for repair in (False, True):
            found = [(one.kind, one.path) for one in self._engine.check(repair).findings]
            if found != [("unknown_format", str(path))]:
                wrong.append(f"a check of another version finds {found}")
        if not path.exists() or path.read_bytes() != changed:
            wrong.append(f"a blob of another version was touched: {path}")
        path.write_bytes(whole)
        return wrong + self._after([])

    def swap(self, key: bytes, other: bytes) -> list[str]:
        """Exchange two files."""
        one, two = (next(row for row in self.rows() if row.key == each) for each in (key, other))
        first, second = blob_path(self._engine, one).read_bytes(), blob_path(self._engine, two).read_bytes()
        blob_path(self._engine, one).write_bytes(second)
        blob_path(self._engine, two).write_bytes(first)
        return self._after([one, two])

    def _after(self, damaged: Sequence[Row], is_met: bool = True) -> list[str]:
        """What is wrong after a fetch of everything, and after a repair. `is_met`: the fetch must meet the damage.

        Of two damaged blobs, one may go with its parent or never be come to.
        """
        wrong = self._read_all()
        wrong += self._require_gone(damaged, "a fetch") if is_met else []
        self._engine.check(repair=True)
        wrong += self._require_gone(damaged, "a repair")
        if found := self._engine.check().findings:
            wrong.append(f"after a repair: {found[0]}")
        self._store_all()
        wrong += self._read_all()
        for ns, tokens, _ in (*FETCHES, *SECRET_FETCHES):
            match = self._engine.match(Chain(ns.root, pack_tokens(tokens)))
            if match.n_tokens != len(tokens):
                wrong.append(f"stored again, {match.n_tokens} of {len(tokens)} tokens are there")
            require_right(self._engine, match, pack_tokens(tokens))
        return wrong

    def _require_gone(self, damaged: Sequence[Row], what: str) -> list[str]:
        """At least one of the damaged blobs is in quarantine, and what is there has no row."""
        quarantine = self._engine._shared.directory.quarantine
        gone = [row for row in damaged if (quarantine / row.blob.name).exists()]
        with self._engine._shared.index.view() as view:
            held = [row for row in gone if view.row(row.key) == row]
        wrong = [f"still held after {what}: {row}" for row in held]
        return wrong if gone or not damaged else [*wrong, f"not in quarantine after {what}: {damaged}"]

    def _store_all(self) -> None:
        store_all(self._engine)
        key = self._engine.encrypt(SECRET.root)
        for ns, tokens, _ in SECRET_FETCHES:
            assert self._engine.store(ns.to_record(), sequence(ns, tokens), encryption=key).reason is Reason.OK

    def _read_all(self) -> list[str]:
        """Fetch every sequence until it can be read; a damaged blob must be told, and then be gone with a reason."""
        wrong: list[str] = []
        for ns, tokens, exact in (*FETCHES, *SECRET_FETCHES):
            for _ in range(8):
                match = self._engine.match(Chain(ns.root, pack_tokens(tokens)), exact=exact)
                try:
                    damaged, served = self._read(match.parts)
                except UnknownFormatError:
                    break  # of an encrypted blob of another version nothing is read
                wrong += served
                if damaged is None:
                    break
                if not self._engine.recheck(damaged.key):
                    wrong.append(f"recheck: {damaged} is said to be sound")
                again = self._engine.match(Chain(ns.root, pack_tokens(tokens)), exact=exact)
                if again.n_tokens >= match.n_tokens or again.reason not in (Reason.CORRUPT, Reason.NO_CHECKPOINT):
                    wrong.append(f"after a recheck: {again.n_tokens} tokens, {again.reason}")
            else:
                wrong.append("damage without end")
        return wrong

    def _read(self, parts: tuple[Slice, ...]) -> tuple[Row | None, list[str]]:
        """(the first row whose file does not hold, what passed its checksum and is wrong)."""
        at = self._engine.first_unusable(parts)
        if at is not None:
            return parts[at].row, []
        for part in parts:
            try:
                with contextlib.closing(self._engine.reader([part])) as reader:
                    for number, (offset, length, checksum) in enumerate(checked_ranges(part.row.block)):
                        got = bytearray(length)
                        reader.readinto(0, offset, [memoryview(got)])
                        if xxhash.xxh3_64_intdigest(got) != checksum:
                            return part.row, []
                        if not _is_right(part.row, number, bytes(got)):
                            return None, [f"wrong bytes: range {number} of {part.row}"]
            except (CorruptDataError, OSError):
                return part.row, []
        return None, []


def _is_right(row: Row, number: int, got: bytes) -> bool:
    """Whether a checked range has the bytes that follow from its tokens (`tests.support.engine`)."""
    if row.is_checkpoint:
        arrays = [(state.layer, at, array) for state in row.block.states for at, array in enumerate(state.arrays)]
        return got == state_values(row.key, *arrays[number]).tobytes()
    stacks = row.block.runs[0].stacks
    at, position = [(at, position) for at, stack in enumerate(stacks) for position in range(len(stack.layers))][number]
    stack = stacks[at]
    whole = values(row.tokens + bytes([at]), len(stack.layers) * len(got)).tobytes()
    return got == whole[position * len(got) : (position + 1) * len(got)]


def blob_cases(blobs: Blobs, flips: int) -> list[tuple[bytes, str, Change]]:
    """(key, what, change) of all blobs."""
    return [
        (row.key, what, change)
        for seed, row in enumerate(blobs.rows())
        for what, change in blob_changes(blobs.path(row), flips, seed)
    ]


# -- the index ------------------------------------------------------------------------------------------------------


class Indexes:
    """Directories whose index is damaged. `clean` was stopped in order, `killed` was not."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)
        prepare(folder / "clean")
        with Engine.open(folder / "clean", options()):
            shutil.copytree(folder / "clean", folder / "killed")

    def cases(self, flips: int) -> list[tuple[str, str, Change]]:
        """(directory, what, change): so many flips in every page; pages zeroed, doubled, torn; the file cut there."""
        found: list[tuple[str, str, Change]] = []
        for kind in ("clean", "killed"):
            data = (self._folder / kind / "index" / "data.mdb").read_bytes()
            pages, chosen = len(data) // _PAGE, random.Random(7)
            for page in range(pages):
                at, other = page * _PAGE, chosen.randrange(pages) * _PAGE
                # Most of a page is values or empty; LMDB follows what stands at its beginning.
                places = [at + chosen.randrange(32 if number % 2 else _PAGE) for number in range(flips)]
                found += [(kind, f"flip in page {page}", _flip(place, chosen.randrange(8))) for place in places]
                found += [
                    (kind, f"page {page} of zeros", _replaced(at, bytes(_PAGE))),
                    (kind, f"page {page} twice", _replaced(at, data[other : other + _PAGE])),
                    (kind, f"page {page} torn", _replaced(at + _PAGE // 2, bytes(_PAGE // 2))),
                    (kind, f"cut at page {page}", lambda data, at=at: bytes(data[:at])),
                ]
        return found

    def strike(self, kind: str, change: Change, repair: bool = False) -> list[str]:
        """Damage the index and start (or repair offline, then start), in a child; what was wrong."""
        data_dir = self._folder / "struck"
        shutil.rmtree(data_dir, ignore_errors=True)
        shutil.copytree(self._folder / kind, data_dir)
        path = data_dir / "index" / "data.mdb"
        path.write_bytes(change(bytearray(path.read_bytes())))
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(told)
            signal.alarm(_TIMEOUT_S)
            try:
                os.write(tell, "\n".join(_require_recovered(data_dir, repair)).encode())
            except Exception:
                os.write(tell, f"the next start: {traceback.format_exc()[-600:]}".encode())
                raise
            finally:
                os._exit(0)
        os.close(tell)
        with os.fdopen(told, "r") as pipe:
            text = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return text.split("\n") if text else [f"crash: {code}"] if code else []


def _require_recovered(data_dir: Path, repair: bool) -> list[str]:
    """Every sequence is there, rebuilt or not, a check finds nothing, every file has its row."""
    wrong: list[str] = []
    if repair:
        check_directory(data_dir)
        check_directory(data_dir, repair=True)
        if found := check_directory(data_dir).findings:
            wrong.append(f"after a repair: {found[0]}")
    with Engine.open(data_dir, options()) as engine:
        for ns, tokens, exact in FETCHES:
            match = engine.match(Chain(ns.root, pack_tokens(tokens)), exact=exact)
            try:
                require_right(engine, match, pack_tokens(tokens))
            except (AssertionError, KVStoreError, OSError) as error:
                wrong.append(f"wrong bytes: {error!r}")
            if match.n_tokens * TOKEN_BYTES != len(pack_tokens(tokens)):
                wrong.append(f"lost: {match.n_tokens} of {len(tokens)} tokens are there")
        if found := engine.check().findings:
            wrong.append(f"after the start: {found[0]}")
        if {Path(info.path) for info in engine.list_blocks(limit=1 << 20)} != blob_paths(data_dir):
            wrong.append("files without a row")
        put(engine, namespace("later"), range(300))
    return wrong
