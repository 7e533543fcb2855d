"""A daemon whose disk is slow or stands still, call by call, while it runs: its processor stays free."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.support.daemon import DaemonProcess
from tests.support.servers import wait_until

# Serves as the command line does. A file in the folder named by KVSTORE_TEST_DISK slows the call of that name down:
# it holds the seconds that each call sleeps, or "hold N": then every N-th call waits until the file is gone.
PROGRAM = """
import os, sys, threading, time
from kvstore.blobs import fs, local
from kvstore.cli import main
from kvstore.engine import engine

CONTROL = os.environ.pop("KVSTORE_TEST_DISK")
plain_unlink, plain_reader = os.unlink, local.LocalBlobs.reader
LONGEST_S = 300.0
calls = {}

def slow(call):
    path = f"{CONTROL}/{call}"
    deadline, held = time.monotonic() + LONGEST_S, False
    while time.monotonic() < deadline:
        try:
            with open(path) as file:
                text = file.read()
        except FileNotFoundError:
            return
        if not text.startswith("hold"):
            time.sleep(float(text or 0))
            return
        if not held:
            calls[call] = calls.get(call, 0) + 1
            if calls[call] % int(text.split()[1]):
                return
            held = True
            open(f"{path}.{threading.get_ident()}.held", "w").close()
        time.sleep(0.01)

class SlowFs(fs.Fs):
    def fsync(self, fd):
        slow("fsync")
        super().fsync(fd)
    def fsync_dir(self, path):
        slow("fsync_dir")
        super().fsync_dir(path)
    def commit(self, commit):
        slow("commit")
        super().commit(commit)

def unlink(path, *args, **kwargs):
    if "/blobs.noindex/" in str(path):
        slow("unlink_blob")
    plain_unlink(path, *args, **kwargs)

def reader(self, sources, open_max):
    if open_max == 1:  # a blob that is verified
        slow("verify")
    return plain_reader(self, sources, open_max)

def maintain(self, plain=engine.Engine.maintain):
    plain(self)
    with open(f"{CONTROL}/upkeep.log", "a") as file:
        file.write(f"{time.monotonic()}\\n")

engine.Fs, os.unlink = SlowFs, unlink
local.LocalBlobs.reader, engine.Engine.maintain = reader, maintain
sys.argv = ["kvstore", "serve", *sys.argv[1:]]
main()
"""


class SlowDisk(DaemonProcess):
    """The daemon, and the pace of its disk. Calls: fsync, fsync_dir, commit (of the index), unlink_blob,
    verify (a blob that is read whole)."""

    def __init__(self, data_dir: Path, **config: Any) -> None:
        super().__init__(data_dir, program=PROGRAM, **config)
        self._control = data_dir.with_name(f"{data_dir.name}.disk")
        self._control.mkdir()

    def environ(self) -> dict[str, str]:
        """With the folder of the controls."""
        return {**super().environ(), "KVSTORE_TEST_DISK": str(self._control)}

    def slow(self, **seconds: float) -> None:
        """From now on each of these calls sleeps so long."""
        for call, each in seconds.items():
            self._say(call, str(each))

    def hold(self, call: str, every: int = 1) -> None:
        """From now on these calls wait, each or every so many."""
        self._say(call, f"hold {every}")

    def await_held(self, call: str) -> None:
        """Return once a call waits."""
        wait_until(lambda: any(self._control.glob(f"{call}.*.held")), 60.0, lambda: f"no {call} was called")

    def release(self, *calls: str) -> None:
        """These calls are fast again, and those that wait go on."""
        for call in calls:
            (self._control / call).unlink(missing_ok=True)
            for held in self._control.glob(f"{call}.*.held"):
                held.unlink()

    def upkeep_times(self) -> list[float]:
        """When upkeep ended, on the clock of `time.monotonic`."""
        path = self._control / "upkeep.log"
        return [float(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _say(self, call: str, text: str) -> None:
        tmp = self._control / f"{call}.tmp"
        tmp.write_text(text)
        os.replace(tmp, self._control / call)
