"""Power cuts on a file system of our own: ext4 on a loop device, shut down by ioctl without flushing its journal.

What no sync reached is gone after that, as after a real cut: with `commit=300` and `noauto_da_alloc` ext4 writes
nothing on its own in the few milliseconds that a run takes. A cut comes just before or just after a call of the
engine's `Fs` seam, or just after an acknowledgement.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import workload
from tests.faults.seam import PointFs, Points
from tests.faults.workload import SCRIPTS, broken_promises

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_NO_LOG_FLUSH = 2
_IMAGE_BYTES = 48 << 20
_OPTIONS = "loop,noauto_da_alloc,commit=300,noatime"
_MKFS = ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0", "-J", "size=4"]
_CUT = 99


def missing() -> str:
    """Why this cannot run here; empty when it can."""
    if not sys.platform.startswith("linux"):
        return "power cuts need Linux and ext4"
    if os.geteuid() != 0:
        return "power cuts need root, to mount"
    tools = [tool for tool in ("mkfs.ext4", "mount", "umount") if shutil.which(tool, path=_path()) is None]
    if tools or not Path("/dev/loop-control").exists():
        return f"power cuts need {', '.join(tools) or 'loop devices'}"
    return ""


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _call(*command: str) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": _path()}, check=False)
    if ran.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {ran.stderr.strip()}")


@dataclass(frozen=True)
class Cut:
    """The power goes at point `number` of a script."""

    script: str
    number: int


class Cuts:
    """Runs scripts on a file system that loses its power. `folder` holds the images and where they are mounted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mount = folder / "mount"
        self._mount.mkdir(parents=True, exist_ok=True)

    def points(self, script: str, bug: str = "") -> list[Cut]:
        """Every point of a script."""
        counter = self._folder / "points"
        self._mounted_fresh(script)
        try:
            self._fork(lambda: self._run(script, bug, -1, counter))
        finally:
            self._unmount()
        return [Cut(script, number) for number in range(int(counter.read_text()))]

    def strike(self, cut: Cut, bug: str = "") -> list[str]:
        """Run to the point, cut, mount again, verify; what was found wrong."""
        acks = self._folder / "acks"
        acks.unlink(missing_ok=True)
        self._mounted_fresh(cut.script)
        try:
            code = self._fork(lambda: self._run(cut.script, bug, cut.number, self._folder / "points"))
            self._unmount()
            if code != _CUT:
                return [f"the script ended by itself with {code}"]
            _call("mount", "-o", _OPTIONS, str(self._image), str(self._mount))
            return broken_promises(cut.script, self._mount / "data", acks, bug)
        finally:
            self._unmount()

    def _run(self, script: str, bug: str, number: int, counter: Path) -> None:
        power = os.open(self._mount, os.O_RDONLY | os.O_DIRECTORY)

        def cut() -> None:
            fcntl.ioctl(power, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
            os._exit(_CUT)

        points = Points(number, cut)
        real = os.write

        def write(fd: int, data: Any) -> int:
            done = real(fd, data)
            if bytes(data[:4]) == b"done":
                points.at()
            return done

        workload.os.write = write  # type: ignore[attr-defined]
        acks = self._folder / "acks"
        workload.run(script, self._mount / "data", acks, bug, lambda fs: PointFs(fs, points.at))
        counter.write_text(str(points.passed))

    @staticmethod
    def _fork(work: Callable[[], None]) -> int:
        """Do it in a child, which need not come back; its exit code."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work()
                code = 0
            finally:
                if code:
                    traceback.print_exc()
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    @property
    def _image(self) -> Path:
        return self._folder / "image"

    def _mounted_fresh(self, script: str) -> None:
        template = self._folder / f"template {script}"
        if not template.exists():
            with template.open("wb") as file:
                file.truncate(_IMAGE_BYTES)
            _call(*_MKFS, str(template))
            _call("mount", "-o", _OPTIONS, str(template), str(self._mount))
            try:
                SCRIPTS[script].prepare(self._mount / "data")
                os.sync()
            finally:
                self._unmount()
        _call("cp", "--sparse=always", str(template), str(self._image))
        _call("mount", "-o", _OPTIONS, str(self._image), str(self._mount))

    def _unmount(self) -> None:
        if os.path.ismount(self._mount):
            _call("umount", str(self._mount))
