"""Disks that fail while the store runs: errors at any call (strace), and a tmpfs that is full."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvstore.core.blocks import Reason
from kvstore.engine import Engine
from kvstore.errors import DirectoryError
from tests.faults import kills
from tests.faults.workload import GROWN, KEPT, NS, broken_promises
from tests.support.engine import find, options, put

READS = "?open,openat,read,pread64,preadv,fstat,newfstatat,?stat,?lstat,getdents64,statfs,flock"
# What disks and volumes say when they fail, each at the calls that may say it.
ERRORS = {
    "EIO": ("store", "evict", "re-encode", "start", "rebuild", "repair"),
    "ENOSPC": ("store", "re-encode", "start"),
    "EROFS": ("store", "start"),
}


class Errors(kills.Kills):
    """As kills, but the call fails, and the process goes on as far as it can."""

    def strike_error(self, point: kills.Point, error: str) -> list[str]:
        """One call fails; the process may give up with a word, but must not be killed by it."""
        data_dir, acks = self._fresh(point.script)
        inject = f"inject={point.call}:error={error}:when={point.number}"
        strace = ["-o", "/dev/null", "-e", f"trace={point.call}", "-e", inject]
        code = self._run(point.script, data_dir, acks, "", strace)
        try:
            crashed = [f"crash: the script ended with {code}"] if code not in (0, 1) else []
            broken = broken_promises(point.script, data_dir, acks)
            # What cannot be read while everything is verified is damaged, and goes to quarantine: no loss of ours.
            may_lose = point.script in ("rebuild", "repair") and point.call in READS
            return crashed + [each for each in broken if not (may_lose and each.startswith("lost"))]
        finally:
            shutil.rmtree(data_dir, ignore_errors=True)


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A tmpfs with these options; its directory for data."""
    folder.mkdir(mode=0o700)
    mount(folder, *options)
    try:
        yield folder / "data"
    finally:
        if os.path.ismount(folder):
            unmount(folder)


def mount(folder: Path, *options: str) -> None:
    """A tmpfs with these options on a folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(("mode=0700", *options)), "tmpfs", str(folder)], check=True)


def bind(real: Path, folder: Path) -> None:
    """The folder `real` on another folder."""
    subprocess.run(["mount", "--bind", str(real), str(folder)], check=True)


def unmount(folder: Path) -> None:
    """Although somebody may use it."""
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, free_blocks: int) -> None:
    """Leave so many blocks of 4 KiB."""
    spare = shutil.disk_usage(folder).free - free_blocks * 4096
    (folder / "filler").write_bytes(bytes(max(0, spare)))


def use_inodes(folder: Path, free_inodes: int) -> None:
    """Leave so many inodes."""
    names = folder / "names"
    names.mkdir()
    made = []
    try:
        for number in range(100_000):
            made.append(names / str(number))
            made[-1].touch()
    except OSError:
        made.pop()
    for path in made[len(made) - free_inodes :] if free_inodes else []:
        path.unlink()


def full_disk(folder: Path, free: int, inodes: bool) -> list[str]:
    """A store into a volume with so much left: all or nothing of it, said; then room again, and all goes on."""
    wrong: list[str] = []
    limit = "nr_inodes=120" if inodes else "size=3m"
    with mounted(folder, limit) as data_dir, Engine.open(data_dir, options(ballast_bytes=64 << 10)) as engine:
        put(engine, NS, KEPT)
        use_inodes(folder, free) if inodes else fill(folder, free)
        try:
            reason = put(engine, NS, GROWN).reason
        except DirectoryError:
            reason = Reason.STORE_FULL
        engine.maintain()
        kept, grown = find(engine, NS, KEPT).n_tokens, find(engine, NS, GROWN).n_tokens
        if reason is Reason.OK and grown != len(GROWN):
            wrong.append(f"lost: {grown} of {len(GROWN)} tokens after an acknowledgement")
        if reason is not Reason.OK and kept != len(KEPT) and not engine.stats().evictions:
            wrong.append(f"lost: {kept} of {len(KEPT)} tokens by a store that failed")
        shutil.rmtree(folder / "names", ignore_errors=True)
        (folder / "filler").unlink(missing_ok=True)
        engine.maintain()
        if engine.stats().degraded:
            wrong.append(f"degraded with room: {engine.stats().degraded}")
        if put(engine, NS, GROWN).reason is not Reason.OK or find(engine, NS, GROWN).n_tokens != len(GROWN):
            wrong.append("it does not go on")
        if found := engine.check().findings:
            wrong.append(f"a check finds {found[0]}")
    return wrong
