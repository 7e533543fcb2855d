"""SIGKILL at any call that changes the disk, by strace: `-e inject=CALL:signal=KILL:when=N`.

The kill comes as the N-th call of that name begins, so the disk is as all calls before left it. Calls that only read
are left out, and of those that open a file the ones that create none: there a kill leaves what one at the next change
does.

strace counts the calls of each thread for itself, so under it a blob is synced by the thread that wrote it. With the
threads that the engine has, the process kills itself, at every point of the `Fs` seam.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from kvstore.blobs import write_behind
from tests.faults.seam import PointFs, Points
from tests.faults.workload import SCRIPTS, broken_promises, run

CHANGES = (
    "?open,openat,?creat,close,write,pwrite64,writev,pwritev,fsync,fdatasync,msync,?rename,renameat,renameat2,?unlink,"
    "unlinkat,?mkdir,mkdirat,?rmdir,ftruncate,truncate,fchmod,?chmod,fchmodat,fallocate,flock,?link,linkat"
)

# Of the calls that are traced, those that change nothing after all.
_READS = re.compile(r"close\(|open(at)?\((?!.*O_(CREAT|TRUNC))")
_CALL = re.compile(r"(\w+)\(")


def missing() -> str:
    """Why this cannot run here; empty when it can."""
    if not sys.platform.startswith("linux"):
        return "kills at system calls need Linux"
    if shutil.which("strace") is None:
        return "kills at system calls need strace: apt-get install strace"
    probe = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, text=True, check=False)
    return "" if probe.returncode == 0 else f"strace may not trace here: {probe.stderr.strip()}"


SEAM = "Fs"


class Inline:
    """In place of the writer's threads: does at once what it is given."""

    def __init__(self, *_: object) -> None:
        """As ThreadPoolExecutor."""

    def submit(self, work: Callable[..., object], *arguments: object) -> Future[object]:
        """Do it; the future is done."""
        future: Future[object] = Future()
        try:
            future.set_result(work(*arguments))
        except BaseException as error:  # noqa: BLE001  # as threads hand it on
            future.set_exception(error)
        return future

    def shutdown(self) -> None:
        """Nothing is left."""


@dataclass(frozen=True)
class Point:
    """One kill: at the call number `number` to `call`; where that is SEAM, at this point of the seam."""

    script: str
    call: str
    number: int


class Kills:
    """Runs scripts in processes that are killed. `folder` holds the templates and the directory of each run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def points(self, script: str, bug: str = "", calls: str = CHANGES) -> list[Point]:
        """Every point of a script.

        `calls` are those that change the disk, unless it is said otherwise; then reads count too.
        """
        data_dir, acks = self._fresh(script)
        trace = self._folder / "trace"
        self._run(script, data_dir, acks, bug, ["-o", str(trace), "-e", f"trace={calls}"])
        made: Counter[str] = Counter()
        points: list[Point] = []
        for line in trace.read_text(errors="replace").splitlines():
            found = _CALL.match(line)
            if found is None:
                continue
            made[found[1]] += 1
            if calls is not CHANGES or not _READS.match(line):
                points.append(Point(script, found[1], made[found[1]]))
        return points

    def seam_points(self, script: str) -> list[Point]:
        """Every point of the seam in a script."""
        data_dir, acks = self._fresh(script)
        counter = self._folder / "points"
        self._wait(self._fork(lambda: self._run_to(-1, counter, script, data_dir, acks)))
        return [Point(script, SEAM, number) for number in range(int(counter.read_text()))]

    def strike_seam(self, point: Point) -> list[str]:
        """As `strike`, at a point of the seam."""
        data_dir, acks = self._fresh(point.script)
        work = functools.partial(self._run_to, point.number, self._folder / "points", point.script, data_dir, acks)
        return self._verified(point, self._wait(self._fork(work)), data_dir, acks, "")

    @staticmethod
    def _run_to(number: int, counter: Path, script: str, data_dir: Path, acks: Path) -> None:
        points = Points(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        run(script, data_dir, acks, wrap=lambda fs: PointFs(fs, points.at))
        counter.write_text(str(points.passed))

    def strike(self, point: Point, bug: str = "") -> list[str]:
        """Run to the point, then verify; what was found wrong."""
        data_dir, acks = self._fresh(point.script)
        inject = f"inject={point.call}:signal=KILL:when={point.number}"
        strace = ["-o", "/dev/null", "-e", f"trace={point.call}", "-e", inject]
        return self._verified(point, self._run(point.script, data_dir, acks, bug, strace), data_dir, acks, bug)

    def _verified(self, point: Point, code: int, data_dir: Path, acks: Path, bug: str) -> list[str]:
        try:
            if code != -signal.SIGKILL:
                return [f"the script was not killed: it ended with {code}"]
            return broken_promises(point.script, data_dir, acks, bug)
        finally:
            shutil.rmtree(data_dir, ignore_errors=True)

    def _fresh(self, script: str) -> tuple[Path, Path]:
        template = self._folder / f"template {script}"
        if not template.exists():
            SCRIPTS[script].prepare(template)
        data_dir = Path(tempfile.mkdtemp(dir=self._folder))
        shutil.copytree(template, data_dir, dirs_exist_ok=True)
        acks = self._folder / f"{data_dir.name}.acks"
        return data_dir, acks

    def _run(self, script: str, data_dir: Path, acks: Path, bug: str, strace: Sequence[str]) -> int:
        """Run a script in a child of this process, under strace from its first line on; the child's exit code.

        A fork has Python and the engine in memory already: six times faster than a process of its own.
        """

        def work() -> None:
            os.kill(os.getpid(), signal.SIGSTOP)
            with mock.patch.object(write_behind, "ThreadPoolExecutor", Inline):
                run(script, data_dir, acks, bug)

        child = self._fork(work)
        os.waitpid(child, os.WUNTRACED)
        with subprocess.Popen(["strace", "-qq", "-p", str(child), *strace], stderr=subprocess.DEVNULL) as tracer:
            while f"TracerPid:\t{tracer.pid}\n" not in Path(f"/proc/{child}/status").read_text():
                if tracer.poll() is not None:
                    os.kill(child, signal.SIGKILL)
                    raise RuntimeError("strace did not attach")
                time.sleep(0.001)
            os.kill(child, signal.SIGCONT)
            return self._wait(child)

    def _fork(self, work: Callable[[], None]) -> int:
        """Do it in a child of this process; its pid."""
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(os.open(self._folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
                work()
                code = 0
            finally:
                if code:
                    traceback.print_exc()
                os._exit(code)
        return child

    @staticmethod
    def _wait(child: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
