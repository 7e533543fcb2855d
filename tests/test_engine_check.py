"""Damage: found, told apart, quarantined or repaired, online and offline; never served."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.core.blocks import BLOCK_TOKENS, Reason, pack_tokens
from kvstore.core.keys import Chain
from kvstore.engine import Engine, NewBlock, Selection, check_directory
from kvstore.errors import DirectoryHeldError, InvalidRequestError, UnknownFormatError
from kvstore.index.rows import Row
from tests.support.engine import (
    RecordingFs,
    Stopped,
    StoppingFs,
    blob_path,
    blob_paths,
    disk_usage,
    drop_children,
    find,
    namespace,
    options,
    put,
    require_sound,
    sequence,
)
from tests.support.files import files_below

NS, OTHER = namespace(), namespace("other")
LONG = list(range(900))


def flip(path: Path, at: int = -1) -> None:
    """Change one byte, and nothing that a directory listing shows."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def paths_of(engine: Engine, tokens: list[int] = LONG) -> list[Path]:
    """The files of a sequence."""
    return [blob_path(engine, part.row) for part in engine.match(Chain(NS.root, pack_tokens(tokens))).slices]


def test_a_damaged_blob_is_quarantined_with_what_comes_after_it(tmp_path: Path) -> None:
    """Once somebody reports it: the hit gets shorter, the reason says why, the file is kept for a look."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, LONG)
        rows = [part.row for part in find(engine, NS, LONG).slices]
        assert not engine.recheck(rows[1].key) and not engine.recheck(bytes(32))
        flip(blob_path(engine, rows[1]))
        assert engine.recheck(rows[1].key)
        assert not engine.recheck(rows[1].key)
        match = find(engine, NS, LONG)
        assert (match.n_tokens, match.reason) == (BLOCK_TOKENS, Reason.CORRUPT)
        assert engine.stats().quarantined == 1 and engine.stats().quarantine_bytes > 0
        require_sound(engine)
        assert put(engine, NS, LONG).reason is Reason.OK
        assert find(engine, NS, LONG).n_tokens == 900


@pytest.mark.parametrize("how", ["missing", "short", "header", "link"])
def test_every_kind_of_damage_is_found_by_a_recheck(tmp_path: Path, how: str) -> None:
    """Gone, cut, a wrong header, something else under its name."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, LONG)
        row = find(engine, NS, LONG).slices[3].row
        path = blob_path(engine, row)
        if how == "header":
            flip(path, 100)
        elif how == "short":
            path.write_bytes(path.read_bytes()[:-1])
        else:
            path.rename(tmp_path / "away")
            if how == "link":
                path.symlink_to(tmp_path / "away")
        assert engine.recheck(row.key)
        assert find(engine, NS, LONG).n_tokens == 768
        require_sound(engine)


def test_quarantine_is_bounded_and_counted(tmp_path: Path) -> None:
    """The oldest go; the rest is part of what the directory costs."""
    with Engine.open(tmp_path / "data", options(quarantine_files_max=3)) as engine:
        for name in range(6):
            put(engine, NS, [name] * 20)
            row = find(engine, NS, [name] * 20).slices[0].row
            flip(blob_path(engine, row))
            assert engine.recheck(row.key)
        assert engine.stats().quarantined == 3
        assert engine.used_bytes == disk_usage(tmp_path / "data")


def damage_missing(engine: Engine) -> None:
    paths_of(engine)[2].unlink()


def damage_corrupt(engine: Engine) -> None:
    flip(paths_of(engine)[2])


def damage_stray(engine: Engine) -> None:
    path = paths_of(engine)[2]
    shutil.copy(path, path.parent / f"{'ab' * 32}-9.safetensors")
    (path.parent / "left.safetensors.tmp").write_bytes(b"torn")
    (path.parent / f"{'cd' * 32}-9.safetensors.tmp").write_bytes(b"torn")


def damage_row(engine: Engine) -> None:
    row = engine.match(Chain(NS.root, pack_tokens(LONG))).slices[2].row
    with engine._shared.index.edit() as edit:
        edit._txn.delete(row.key, db=edit._db["rows"])


def damage_table(engine: Engine) -> None:
    with engine._shared.index.edit() as edit:
        edit.table.resize(engine.match(Chain(NS.root, pack_tokens(LONG))).slices[1].row.key, 12345)


def set_version(path: Path) -> None:
    """Another format version, in as many bytes."""
    data, count = re.subn(rb'"version":"[0-9]"', b'"version":"9"', path.read_bytes(), count=1)
    assert count == 1
    path.write_bytes(data)


DAMAGES: list[tuple[Callable[[Engine], None], set[str], int]] = [
    (damage_missing, {"missing_blob"}, 512),
    (damage_corrupt, {"corrupt_blob"}, 512),
    (damage_stray, {"stray_blob", "corrupt_blob"}, 900),
    # Offline the table that does not agree with the rows is reason enough to rebuild all of the index.
    (damage_row, {"stray_blob", "missing_parent", "row"}, 768),
    (damage_table, {"row"}, 900),
    (drop_children, {"row"}, 900),
]


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize(("damage", "kinds", "left"), DAMAGES)
def test_a_check_finds_damage_and_a_repair_mends_it(
    tmp_path: Path, damage: Callable[[Engine], None], kinds: set[str], left: int, online: bool
) -> None:
    """The same walk for a running engine and a directory nobody holds; without repair nothing changes."""
    engine = Engine.open(tmp_path / "data", options())
    put(engine, NS, LONG)
    damage(engine)

    def check(repair: bool) -> set[str]:
        report = engine.check(repair) if online else check_directory(tmp_path / "data", repair)
        assert bool(report.repaired) == (repair and bool(report.findings))
        return {finding.kind for finding in report.findings}

    if not online:
        engine.close()
    files = blob_paths(tmp_path / "data")
    assert check(False) & kinds and check(False) <= kinds
    assert blob_paths(tmp_path / "data") == files
    assert check(True) <= kinds
    assert check(False) == set()
    if not online:
        engine = Engine.open(tmp_path / "data", options())
    assert find(engine, NS, LONG).n_tokens == (900 if damage is damage_row and not online else left)
    require_sound(engine)
    assert put(engine, NS, LONG).reason is Reason.OK
    engine.close()


def test_a_repair_leaves_alone_what_a_store_is_writing(tmp_path: Path) -> None:
    """Its blobs have temporary names until the commit, and are no strays."""

    class Held(RecordingFs):
        """Files are synced once `let` is set, so until then they are temporary."""

        let = threading.Event()

        def fsync(self, fd: int) -> None:
            assert self.let.wait(60)
            super().fsync(fd)

    fs = Held()
    fs.let.clear()
    data_dir, seen = tmp_path / "data", set()
    with Engine.open(data_dir, options(), fs) as engine:

        def blocks() -> Iterator[NewBlock]:
            for number, block in enumerate(sequence(NS, LONG)):
                assert engine.check(repair=True).findings == []
                seen.update(path.suffix for path in files_below(data_dir / "blobs.noindex") if "-" in path.name)
                if number == 2:
                    fs.let.set()
                yield block

        assert engine.store(NS.to_record(), blocks()).blocks == 4
        assert seen == {".tmp"} and find(engine, NS, LONG).n_tokens == 900
        require_sound(engine)


def test_a_repair_rebuilds_a_deleted_index_offline(tmp_path: Path) -> None:
    """Every sound blob gets its row back."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, LONG)
    shutil.rmtree(tmp_path / "data" / "index")
    report = check_directory(tmp_path / "data", repair=True)
    assert report.repaired >= 4 and report.blobs == 4
    assert check_directory(tmp_path / "data").findings == []
    with Engine.open(tmp_path / "data", options()) as engine:
        assert find(engine, NS, LONG).n_tokens == 900
        require_sound(engine)


def test_an_unreadable_index_is_a_finding_and_a_repair_replaces_it(tmp_path: Path) -> None:
    """Offline, where it can be set aside."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, LONG)
    index = tmp_path / "data" / "index" / "data.mdb"
    index.write_bytes(b"\xff" * index.stat().st_size)
    assert [finding.kind for finding in check_directory(tmp_path / "data").findings] == ["row"]
    assert check_directory(tmp_path / "data", repair=True).repaired
    assert check_directory(tmp_path / "data").findings == []
    with Engine.open(tmp_path / "data", options()) as engine:
        assert find(engine, NS, LONG).n_tokens == 900


def test_an_offline_check_needs_the_directory_for_itself(tmp_path: Path) -> None:
    """A running engine holds it; a directory that is not there is a finding."""
    with Engine.open(tmp_path / "data", options()), pytest.raises(DirectoryHeldError):
        check_directory(tmp_path / "data")
    assert check_directory(tmp_path / "nothing").findings and not (tmp_path / "nothing").exists()


def test_a_blob_of_another_format_version_is_left_alone(tmp_path: Path) -> None:
    """A check says so; a rebuild refuses rather than lose it."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, LONG)
        path = paths_of(engine)[3]
    set_version(path)
    shutil.rmtree(tmp_path / "data" / "index")
    kinds = {finding.kind for finding in check_directory(tmp_path / "data", repair=True).findings}
    assert kinds == {"row", "stray_blob", "unknown_format"} and path.exists()
    shutil.rmtree(tmp_path / "data" / "index")
    with pytest.raises(UnknownFormatError, match=path.name):
        Engine.open(tmp_path / "data", options())
    assert path.exists()


def make_other(path: Path) -> None:
    """As another kvstore may write it: another number, and something that this one does not know."""
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    header["__metadata__"].update(version="9", novelty="x" * 100)
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // 64) * 64 - 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[size:])


@pytest.mark.parametrize("others", [0, 3])
def test_what_stands_behind_a_blob_of_another_version_outlives_an_index_that_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """The start refuses, however much else is found, and deletes nothing: the other kvstore finds all of it."""
    monkeypatch.setattr("kvstore.engine.adopt.ADOPTED_MAX", 2)
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, LONG)
        for number in range(others):
            put(engine, NS, [-1 - number, *LONG[:300]])
        other, *behind = [blob_path(engine, part.row) for part in find(engine, NS, LONG).slices[1:]]
    before = other.read_bytes()
    make_other(other)
    shutil.rmtree(tmp_path / "data" / "index")
    for _ in range(2):
        with pytest.raises(UnknownFormatError, match=other.name):
            Engine.open(tmp_path / "data", options())
    check_directory(tmp_path / "data", repair=True)
    assert all(path.exists() for path in behind)
    other.write_bytes(before)
    shutil.rmtree(tmp_path / "data" / "index")
    with Engine.open(tmp_path / "data", options()) as engine:
        assert find(engine, NS, LONG).n_tokens == len(LONG)
        require_sound(engine)


@pytest.mark.parametrize("online", [True, False])
def test_a_blob_of_another_version_under_a_row_is_said_and_left_alone(tmp_path: Path, online: bool) -> None:
    """By a fetch, by a report of damage, by the scrub and by a repair; what it stands for is a miss."""
    engine = Engine.open(tmp_path / "data", options())
    put(engine, NS, LONG)
    parts = find(engine, NS, LONG).slices
    path = blob_path(engine, parts[1].row)
    make_other(path)
    left = path.read_bytes()
    assert engine.first_unusable(parts) == 1
    assert not engine.recheck(parts[1].row.key)
    if not online:
        engine.close()
    report = engine.check(repair=True) if online else check_directory(tmp_path / "data", repair=True)
    assert [(found.kind, found.path) for found in report.findings] == [("unknown_format", str(path))]
    assert report.repaired == 0
    if not online:
        engine = Engine.open(tmp_path / "data", options())
    assert path.read_bytes() == left and engine.stats().quarantined == 0
    engine.close()


def test_a_start_after_a_kill_leaves_blobs_of_another_version_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Under a row and without one; what is ours and has no row is unlinked."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, LONG)
        rows = [part.row for part in find(engine, NS, LONG).slices]
        shutil.copytree(tmp_path / "data", tmp_path / "killed")
    paths = [tmp_path / "killed" / blob_path(engine, row).relative_to(tmp_path / "data") for row in rows]
    ours, stray = (paths[0].with_name(f"{bytes(32).hex()}-{number}.safetensors") for number in (70, 71))
    shutil.copyfile(paths[0], ours)
    shutil.copyfile(paths[0], stray)
    make_other(stray)
    make_other(paths[3])
    with Engine.open(tmp_path / "killed", options()) as engine:
        assert not ours.exists() and stray.exists() and paths[3].exists()
        assert find(engine, NS, LONG).n_tokens == 768
        assert engine.stats().quarantined == 0
        assert "left 2 that cannot be read" in caplog.text


def store_and_evict(engine: Engine) -> None:
    """What is evicted again was there; whatever else has the same names goes with it."""
    put(engine, NS, LONG)
    assert find(engine, NS, LONG).n_tokens == len(LONG)
    engine.evict(Selection(namespace_prefix=NS.root))


@pytest.mark.parametrize("how", ["a start after a kill", "a repair", "an offline repair"])
def test_no_blob_gets_the_name_of_one_that_another_kvstore_wrote(tmp_path: Path, how: str) -> None:
    """It has no row, so nobody else counts its number; the same prompt, stored again, would take its place."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, OTHER, LONG)
        put(engine, NS, LONG)
        paths = paths_of(engine)
        # The numbers that come next.
        other = [path.with_name(f"{path.name[:64]}-{at + 9}.safetensors") for at, path in enumerate(paths)]
        for path, copy in zip(paths, other, strict=True):
            shutil.copyfile(path, copy)
            make_other(copy)
        engine.evict(Selection(namespace_prefix=NS.root))
        assert engine._shared.next_number == 9
        shutil.copytree(tmp_path / "data", tmp_path / "killed")
        if how == "a repair":
            engine.check(repair=True)
            store_and_evict(engine)
            shutil.rmtree(tmp_path / "killed")
            shutil.copytree(tmp_path / "data", tmp_path / "killed")
    if how == "an offline repair":
        check_directory(tmp_path / "killed", repair=True)
    if how != "a repair":
        with Engine.open(tmp_path / "killed", options()) as engine:
            store_and_evict(engine)
    for path in other:
        assert b'"version":"9"' in (tmp_path / "killed" / path.relative_to(tmp_path / "data")).read_bytes()


@pytest.mark.parametrize("number", ["007", str(1 << 62), str((1 << 64) - 1), "9" * 20])
@pytest.mark.parametrize("how", ["a start after a kill", "a rebuild", "a repair"])
def test_a_number_that_no_kvstore_gives_is_no_name_of_a_blob(tmp_path: Path, number: str, how: str) -> None:
    """Sound as it is, it would use up the numbers of all that comes after it, or not be found under its row's name."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, LONG)
        row = find(engine, NS, LONG).slices[-1].row
        planted = blob_path(engine, row).with_name(f"{row.key.hex()}-{number}.safetensors")
        blob_path(engine, row).rename(planted)
        if how == "a repair":
            engine.check(repair=True)
        elif how == "a start after a kill":
            shutil.copytree(tmp_path / "data", tmp_path / "killed")
    data = tmp_path / ("killed" if how == "a start after a kill" else "data")
    if how == "a rebuild":
        shutil.rmtree(data / "index")
    with Engine.open(data, options()) as engine:
        put(engine, OTHER, LONG)
        assert (find(engine, NS, LONG).n_tokens, find(engine, OTHER, LONG).n_tokens) == (768, len(LONG))
        require_sound(engine)
        assert engine._shared.next_number < 100
    assert not (data / planted.relative_to(tmp_path / "data")).exists()


def test_a_blob_stored_under_another_alias_is_sound(tmp_path: Path) -> None:
    """Its header has the name of then, the index the name of now."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, replace(NS, alias="then"), LONG[:256])
        put(engine, replace(NS, alias="now"), LONG)
        assert engine.first_unusable(find(engine, NS, LONG).slices) is None
        assert engine.check().findings == []


def test_a_rebuild_keeps_the_better_of_two_and_drops_what_cannot_be_reached(tmp_path: Path) -> None:
    """Old and new file of one key after a crash between commit and unlink; a child without its parent."""
    saved: dict[Path, bytes] = {}
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, LONG, fidelity=400)
        saved.update({path: path.read_bytes() for path in paths_of(engine)[:1]})
        put(engine, NS, LONG, fidelity=900)
        orphan: Row = find(engine, NS, LONG).slices[2].row
        paths_of(engine)[1].unlink()
    for path, data in saved.items():
        path.write_bytes(data)
    shutil.rmtree(tmp_path / "data" / "index")
    with Engine.open(tmp_path / "data", options()) as engine:
        match = find(engine, NS, LONG)
        assert (match.n_tokens, match.fidelity) == (256, 900)
        assert not blob_path(engine, orphan).exists()
        require_sound(engine)


def test_a_namespace_goes_with_its_last_row_and_stays_with_the_others(tmp_path: Path) -> None:
    """From the index too: a tenant that is evicted leaves no record behind."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, LONG)
        put(engine, namespace("b"), LONG)
        engine.evict(Selection(namespace_prefix=NS.root))
        assert [one.info.alias for one in engine.stats().namespaces] == ["b"]
        assert engine.namespace(NS.root) is None and [one.info.alias for one in engine.stats().namespaces] == ["b"]
    with Engine.open(tmp_path / "data", options()) as engine:
        assert [one.info.alias for one in engine.stats().namespaces] == ["b"]
        put(engine, NS, LONG)
        require_sound(engine)


def test_a_stray_that_a_live_engine_adopts_never_shares_its_number(tmp_path: Path) -> None:
    """Its number may be higher than any that this engine has given out."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, LONG)
        row = find(engine, NS, LONG).slices[3].row
        path = blob_path(engine, row)
        path.rename(path.with_name(path.name.replace(f"-{row.number}.", "-70.")))
        engine.check(repair=True)
        assert find(engine, NS, LONG).slices[3].row.number == 70
        put(engine, NS, [7, *LONG])
        assert min(part.row.number for part in find(engine, NS, [7, *LONG]).slices) > 70
        require_sound(engine)


def test_an_eviction_that_is_refused_or_only_tried_writes_nothing(tmp_path: Path) -> None:
    """Not even the access order; what was noted stays noted."""
    fs = RecordingFs()
    with Engine.open(tmp_path / "data", options(), fs) as engine:
        put(engine, NS, LONG)
        engine.touch(find(engine, NS, LONG).slices)
        fs.calls.clear()
        with pytest.raises(InvalidRequestError):
            engine.evict(Selection())
        assert engine.evict(Selection(all=True), dry_run=True).blocks == 4
        assert fs.calls == []


def test_an_interrupted_rebuild_begins_again_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill between two commits of it, blobs without a row are not strays."""
    monkeypatch.setattr("kvstore.engine.adopt.ADOPTED_MAX", 2)
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, LONG)
        shutil.copytree(tmp_path / "data", tmp_path / "killed")
    (tmp_path / "killed" / "index" / "data.mdb").write_bytes(b"")
    total = 0
    for at in range(100):
        data_dir, snapshot = tmp_path / f"d{at}", tmp_path / f"s{at}"
        shutil.copytree(tmp_path / "killed", data_dir)
        try:
            Engine.open(data_dir, options(), StoppingFs(at, data_dir, snapshot)).close()
        except Stopped:
            with Engine.open(snapshot, options()) as engine:
                assert find(engine, NS, LONG).n_tokens == 900
                require_sound(engine)
            total += 1
        else:
            break
    assert total >= 4
