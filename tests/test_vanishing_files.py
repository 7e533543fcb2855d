"""Files that are removed after they were listed, by another thread, a daemon or a person, are no error."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.blobs.fs import Fs, sync_tree
from kvstore.engine import Engine
from tests.support.engine import blob_paths, disk_usage, namespace, options, put
from tests.support.files import contents_below, files_below

GOING = "going.safetensors"  # a file or a folder of this name is removed as soon as it has been listed


class Listing:
    """What os.scandir gives, but read at once."""

    def __init__(self, entries: list[os.DirEntry[str]]) -> None:
        self._entries = iter(entries)

    def __iter__(self) -> Iterator[os.DirEntry[str]]:
        return self

    def __next__(self) -> os.DirEntry[str]:
        return next(self._entries)

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def removed(folder: Any) -> None:
    """Remove what goes from a folder."""
    for path in (os.path.join(os.fspath(folder), name) for name in (GOING, f"{'0' * 64}-1.dropped")):
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.unlink(path)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Holds two blobs. Every folder that code may look into has files and folders that go once they are listed."""
    with Engine.open(tmp_path / "data", options()) as opened:
        put(opened, namespace(), list(range(300)))
        place = opened._shared.directory
        stays = place.blobs / f"{'0' * 64}-2.dropped"
        for folder in (place.index, place.quarantine, place.settings, stays, place.blobs / f"{'0' * 64}-1.dropped"):
            folder.mkdir(exist_ok=True)
            (folder / GOING).write_bytes(b"1")
        (place.quarantine / "stays").write_bytes(b"1")
        (place.settings / "folder" / GOING).mkdir(parents=True)
        scandir, listdir = os.scandir, os.listdir

        def scanned(folder: Any = ".") -> Listing:
            with scandir(folder) as entries:
                found = Listing(list(entries))
            with monkeypatch.context() as plain:
                plain.setattr(os, "scandir", scandir)
                removed(folder)
            return found

        def listed(folder: Any = ".") -> list[str]:
            found = listdir(folder)
            removed(folder)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", scanned)
            patch.setattr(os, "listdir", listed)
            yield opened


LOOKED_AT: dict[str, Callable[[Engine], object]] = {
    "index": lambda engine: engine._shared.index.disk_bytes(),
    "folders": lambda engine: engine._shared.blobs.overhead_bytes,
    "names": lambda engine: list(engine._shared.blobs.names()),
    "clear": lambda engine: engine._shared.blobs.clear(100),
    "quarantined": lambda engine: engine._shared.blobs.quarantined(),
    "trim": lambda engine: engine._shared.blobs.trim_quarantine(1),
    "sync": lambda engine: sync_tree(Fs(), str(engine._shared.directory.settings)),
    "disk usage": lambda engine: disk_usage(engine._shared.directory.root),
    "files": lambda engine: files_below(engine._shared.directory.root),
    "contents": lambda engine: contents_below(engine._shared.directory.root),
    "blob paths": lambda engine: blob_paths(engine._shared.directory.root),
}


@pytest.mark.parametrize("what", LOOKED_AT)
def test_what_goes_after_it_was_listed_is_left_out(engine: Engine, what: str) -> None:
    """No error: it is not there, and takes nothing."""
    found = LOOKED_AT[what](engine)
    assert what not in ("files", "contents") or not [path for path in found if path.name == GOING]  # type: ignore[attr-defined]
