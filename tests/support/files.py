"""What lies below a folder that a process may be changing: listed, measured and read, without what goes meanwhile."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path


def paths_below(folder: Path, suffix: str = "") -> dict[Path, os.stat_result]:
    """Whatever is below a folder, folders too, with what lstat says of it, in order of name. Links are not followed."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *names) if name.endswith(suffix)):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                found[path] = path.lstat()
    return dict(sorted(found.items()))


def files_below(folder: Path, suffix: str = "") -> dict[Path, os.stat_result]:
    """The regular files of `paths_below`."""
    return {path: info for path, info in paths_below(folder, suffix).items() if stat.S_ISREG(info.st_mode)}


def contents_below(folder: Path, suffix: str = "") -> dict[Path, bytes]:
    """What the files of `files_below` hold."""
    found = {}
    for path in files_below(folder, suffix):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found[path] = path.read_bytes()
    return found


def taken_bytes(states: Iterable[os.stat_result]) -> int:
    """What files take on disk, as `du` counts."""
    return sum(info.st_blocks * 512 for info in states)
