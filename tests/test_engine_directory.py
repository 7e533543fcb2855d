"""Where the data may lie: ours alone, on the right disk, or refused with cause and fix."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.blobs.fs import Fs
from kvstore.core.blocks import Reason
from kvstore.engine import Engine, check_directory, directory
from kvstore.engine.recover import Place, set_index_aside
from kvstore.errors import DirectoryError
from tests.support.engine import blob_path, blob_paths, find, namespace, options, put


def refused(path: Path) -> str:
    """The message with which a directory is refused."""
    with pytest.raises(DirectoryError) as caught:
        Engine.open(path, options())
    return str(caught.value)


def test_a_fresh_directory_is_made_private_and_tagged(tmp_path: Path) -> None:
    """0700, with the tag by which backups know a cache."""
    Engine.open(tmp_path / "data", options()).close()
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    assert (tmp_path / "data" / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")
    names = {path.name for path in (tmp_path / "data").iterdir()}
    assert names == {
        "CACHEDIR.TAG",
        "blobs.noindex",
        "id",
        "index",
        "lock",
        "quarantine",
        "quality",
        "settings",
    }


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o777])
def test_a_directory_that_others_can_reach_is_refused_with_the_fix(tmp_path: Path, mode: int) -> None:
    """The message is the command; nothing is changed."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(mode)
    assert f"chmod 700 {tmp_path / 'data'}" in refused(tmp_path / "data")
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == mode
    assert list((tmp_path / "data").iterdir()) == []
    (tmp_path / "data").chmod(0o700)
    Engine.open(tmp_path / "data", options()).close()


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Naming both users."""
    Engine.open(tmp_path / "data", options()).close()
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert "4711" in refused(tmp_path / "data")


def test_a_directory_whose_parent_is_missing_is_refused_outside_of_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be on a volume that is not mounted; below the home directory it is made."""
    message = refused(tmp_path / "volume" / "data")
    assert "mount" in message and f"mkdir -p {tmp_path / 'volume'}" in message
    assert not (tmp_path / "volume").exists()
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Engine.open(tmp_path / "home" / ".local" / "share" / "kvstore", options()).close()


def test_a_volume_that_is_not_mounted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS the folder under /Volumes may exist on the boot disk; a link to a mounted volume is fine."""
    monkeypatch.setattr(directory, "VOLUMES", tmp_path)
    (tmp_path / "Disk").mkdir()
    assert "not mounted" in refused(tmp_path / "Disk" / "data")
    assert "not mounted" in refused(tmp_path / "Gone" / "data")
    assert list((tmp_path / "Disk").iterdir()) == []
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    Engine.open(tmp_path / "Disk" / "data", options()).close()


def test_a_volume_without_modes_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FAT and exFAT behave: whatever mode is asked for, all may read."""
    real = os.mkdir
    monkeypatch.setattr(Fs, "mkdir", lambda self, path: real(path, 0o755))
    assert "exFAT" in refused(tmp_path / "data")
    assert not (tmp_path / "data").exists()
    (tmp_path / "old").mkdir(mode=0o755)

    def made(**where: object) -> str:
        path = f"{where['dir']}/probe"
        real(path, 0o755)
        return path

    monkeypatch.setattr(directory.tempfile, "mkdtemp", made)
    assert "exFAT" in refused(tmp_path / "old")


def test_things_that_are_in_the_way_are_named(tmp_path: Path) -> None:
    """A file where the directory or one of its folders should be, a link where the lock should be."""
    (tmp_path / "file").write_bytes(b"")
    assert "not a directory" in refused(tmp_path / "file")
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "data" / "index").write_bytes(b"")
    assert "index is not a directory" in refused(tmp_path / "data")
    (tmp_path / "data" / "index").unlink()
    (tmp_path / "data" / "lock").unlink()
    (tmp_path / "data" / "lock").symlink_to(tmp_path / "file")
    assert "lock" in refused(tmp_path / "data")


def test_a_refused_start_lets_go_of_the_lock(tmp_path: Path) -> None:
    """The next try, with the cause removed, works in the same process."""
    Engine.open(tmp_path / "data", options()).close()
    (tmp_path / "data" / "quality").rmdir()
    (tmp_path / "data" / "quality").write_bytes(b"")
    refused(tmp_path / "data")
    (tmp_path / "data" / "quality").unlink()
    Engine.open(tmp_path / "data", options()).close()


@pytest.mark.parametrize("clean", [True, False])
def test_a_blob_folder_that_is_a_link_is_never_followed(tmp_path: Path, clean: bool) -> None:
    """A start after a kill would unlink what is behind it; a repair puts the link itself in quarantine."""
    others = tmp_path / "others"
    others.mkdir()
    names = ("notes.txt", f"{bytes(32).hex()}-7.safetensors")
    for name in names:
        (others / name).write_bytes(b"not ours")
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, namespace(), range(300))
        free = tmp_path / "data" / "blobs.noindex" / bytes(32).hex()
        free.symlink_to(others)
        engine.check(repair=True)
        assert sorted(path.name for path in others.iterdir()) == sorted(names)
        assert engine.check().findings == [] and not os.path.lexists(free)
        free.symlink_to(others)
        if not clean:
            shutil.copytree(tmp_path / "data", tmp_path / "killed", symlinks=True)
    data = tmp_path / ("data" if clean else "killed")
    for opening in (lambda: Engine.open(data, options()), lambda: check_directory(data, repair=True)):
        with pytest.raises(DirectoryError, match=f"{free.name} is not a directory"):
            opening()
    assert sorted(path.name for path in others.iterdir()) == sorted(names)
    (data / "blobs.noindex" / free.name).unlink()
    with Engine.open(data, options()) as engine:
        assert find(engine, namespace(), range(300)).n_tokens == 300


JUNK: dict[str, Callable[[Path], None]] = {
    "a folder": Path.mkdir,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a pipe": os.mkfifo,
    "nested too deep": lambda path: path.write_text("[" * 4000),
    "something else": lambda path: path.write_text("[]"),
}


@pytest.mark.parametrize("what", JUNK)
def test_junk_among_the_keys_is_named_by_start_and_check(tmp_path: Path, what: str) -> None:
    """It might be a key that matters, so it is neither deleted nor passed over; and nothing waits for it."""
    settings = options(master_key=bytes(32))
    Engine.open(tmp_path / "data", settings).close()
    keys = tmp_path / "data.keys" / (tmp_path / "data" / "id").read_text()
    keys.mkdir(mode=0o700, parents=True)
    junk = keys / f"{bytes(32).hex()}.json"
    JUNK[what](junk)
    for opening in (
        lambda: Engine.open(tmp_path / "data", settings),
        lambda: check_directory(tmp_path / "data", master_key=bytes(32)),
    ):
        with pytest.raises(DirectoryError, match=f"{junk.name} cannot be read"):
            opening()
    assert os.path.lexists(junk)


def damage(path: Path) -> None:
    """Another file in its place, so that links to it keep what they had."""
    path.unlink()
    path.write_bytes(b"damaged")


def quarantined_by_a_fetch(engine: Engine) -> Path:
    """A damaged blob that is read again."""
    [*_, part] = find(engine, namespace(), range(300)).slices
    damage(blob_path(engine, part.row))
    engine.recheck(part.row.key)
    return blob_path(engine, part.row)


def quarantined_by_a_repair(engine: Engine) -> Path:
    """A damaged blob with a row."""
    [*_, part] = find(engine, namespace(), range(300)).slices
    damage(blob_path(engine, part.row))
    engine.check(repair=True)
    return blob_path(engine, part.row)


def quarantined_without_a_row(engine: Engine) -> Path:
    """Somebody's file among the blobs."""
    [part, *_] = find(engine, namespace(), range(300)).slices
    stray = blob_path(engine, part.row).with_name("stray")
    stray.write_bytes(b"damaged")
    engine.check(repair=True)
    return stray


QUARANTINED = [quarantined_by_a_fetch, quarantined_by_a_repair, quarantined_without_a_row]


@pytest.mark.parametrize("quarantined_by", QUARANTINED)
def test_a_quarantine_that_was_deleted_is_made_again(tmp_path: Path, quarantined_by: Callable[[Engine], Path]) -> None:
    """Closed to others, when there is something to put in it; until then nothing is amiss."""
    quarantine = tmp_path / "data" / "quarantine"
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, namespace(), range(300))
        quarantine.rmdir()
        assert not engine.is_displaced() and put(engine, namespace(), range(600)).reason is Reason.OK
        path = quarantined_by(engine)
        assert not path.exists() and [each.name for each in quarantine.iterdir()] == [path.name]
        assert stat.S_IMODE(quarantine.stat().st_mode) == 0o700
        assert engine.check().findings == []


def test_a_quarantine_that_is_deleted_before_an_index_is_set_aside_is_made_again(tmp_path: Path) -> None:
    """A start makes it, and somebody may be as quick."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, namespace(), range(300))
    quarantine, index = tmp_path / "data" / "quarantine", tmp_path / "data" / "index" / "data.mdb"
    claimed, held = directory.claim(tmp_path / "data")
    quarantine.rmdir()
    with held:
        set_index_aside(Place(claimed, held, options(), Fs()))
    assert not index.exists() and [each.suffix for each in quarantine.iterdir()] == [".mdb"]


@pytest.mark.parametrize("quarantined_by", QUARANTINED)
def test_what_no_quarantine_takes_loses_its_row_and_is_said(
    tmp_path: Path,
    quarantined_by: Callable[[Engine], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A link that appears under way: nothing goes behind it, and a repair does not claim to have put it right."""
    others = tmp_path / "others"
    others.mkdir()
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, namespace(), range(300))
        (tmp_path / "data" / "quarantine").rmdir()
        (tmp_path / "data" / "quarantine").symlink_to(others)
        monkeypatch.setattr(engine._shared, "is_displaced", lambda: False)
        path = quarantined_by(engine)
        assert "could not be put in quarantine" in caplog.text and list(others.iterdir()) == []
        assert path.read_bytes() == b"damaged"
        report = engine.check(repair=True)
        assert {found.path for found in report.findings} == {str(path)} and report.repaired == 0
        (tmp_path / "data" / "quarantine").unlink()
        assert engine.check(repair=True).repaired == 1 and engine.check().findings == []


def test_a_quarantine_that_became_a_link_is_not_trimmed(tmp_path: Path) -> None:
    """It keeps so many files and unlinks older ones: behind a link they would be another's."""
    others = tmp_path / "others"
    others.mkdir()
    for number in range(5):
        (others / str(number)).write_bytes(b"not ours")
    with Engine.open(tmp_path / "data", options(quarantine_files_max=1)) as engine:
        put(engine, namespace(), range(300))
        (tmp_path / "data" / "quarantine").rmdir()
        (tmp_path / "data" / "quarantine").symlink_to(others)
        path = next(blob_path(engine, info.row) for info in engine.list_blocks(namespace().root, limit=1))
        path.write_bytes(b"damaged")
        with pytest.raises(DirectoryError, match="deleted or replaced"):
            engine.check(repair=True)
        engine.maintain()
        assert sorted(each.name for each in others.iterdir()) == list("01234") and path.exists()
        (tmp_path / "data" / "quarantine").unlink()


@pytest.mark.parametrize("folder", ["blobs.noindex", "settings", "index", "quarantine"])
def test_a_directory_with_a_link_in_place_of_a_folder_is_displaced(tmp_path: Path, folder: str) -> None:
    """Even to the folder itself: nothing is stored, evicted or repaired through it."""
    with Engine.open(tmp_path / "data", options()) as engine:
        assert not engine.is_displaced()
        (tmp_path / "data" / folder).rename(tmp_path / "elsewhere")
        (tmp_path / "data" / folder).symlink_to(tmp_path / "elsewhere")
        assert engine.is_displaced()


class Swapped(Fs):
    """Puts another directory in the place of ours, when told to, as soon as the index has committed."""

    data_dir: Path | None = None

    def commit(self, commit: Callable[[], None]) -> None:
        commit()
        if self.data_dir is not None:
            self.data_dir.rename(self.data_dir.with_name("ours"))
            shutil.copytree(self.data_dir.with_name("ours"), self.data_dir)


@pytest.mark.parametrize("durability", ["commit", "full", "none"])
def test_a_store_whose_directory_is_replaced_before_the_reply_is_not_acknowledged(
    tmp_path: Path, durability: str
) -> None:
    """Its rows went with the old one; in the new one nothing is touched."""
    fs = Swapped()
    with Engine.open(tmp_path / "data", options(durability=durability), fs=fs) as engine:
        put(engine, namespace(), range(300))
        before = blob_paths(tmp_path / "data")
        fs.data_dir = tmp_path / "data"
        receipt = put(engine, namespace(), range(1000))
        fs.data_dir = None
        assert (receipt.reason, receipt.blocks, receipt.new_bytes) == (Reason.STORE_FULL, 0, 0)
        assert engine.is_displaced() and before < blob_paths(tmp_path / "data")
