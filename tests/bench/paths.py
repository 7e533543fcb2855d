"""Files and functions that STORE and FETCH pass through, in the worker and in the daemon: how long the two paths are.

    python tests/bench/paths.py [--list]

A worker and a daemon run with a profile hook. After one store and one fetch, so that imports and connections are behind
them, a second store (of new tokens, waiting for the daemon's word) and a second fetch are recorded. What the processes
call anyway, seen in idle seconds, is left out; so are generated code and comprehensions.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

PACKAGE = str(ROOT / "kvstore") + os.sep
GENERATED = os.path.join(PACKAGE, "wire", "v1") + os.sep
IDLE_S = 3.0
# What a call leaves to be done after its answer: a fetch its report, a store the end of its upload.
AFTER_S = 1.0


class Watch:
    """The functions of kvstore that this process calls while it is on. Make it before any thread is started."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str]] = set()
        self.is_on = False
        threading.setprofile(self._call)
        sys.setprofile(self._call)

    def _call(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if self.is_on and event == "call" and code.co_filename.startswith(PACKAGE):
            name = code.co_qualname
            if not code.co_filename.startswith(GENERATED) and not name.endswith(("comp>", "genexpr>", "<module>")):
                self.seen.add((code.co_filename[len(PACKAGE) :], name))

    def take(self) -> set[tuple[str, str]]:
        """What was seen since the last time."""
        seen, self.seen = self.seen, set()
        return seen


def watch_daemon(folder: str) -> None:
    """In the daemon: record from one SIGUSR1 to the next, and write down what was seen at each."""
    watch = Watch()
    numbers = iter(range(1 << 30))

    def turn(signum: int, frame: FrameType | None) -> None:
        if watch.is_on:
            watch.is_on = False
            part = Path(folder) / "part"
            part.write_text(json.dumps(sorted(watch.take())))
            part.rename(Path(folder) / str(next(numbers)))
        else:
            watch.is_on = True
            (Path(folder) / "on").touch()

    signal.signal(signal.SIGUSR1, turn)


PROGRAM = (
    "import sys; sys.path.insert(0, {root!r}); from tests.bench.paths import watch_daemon; watch_daemon({folder!r}); "
    "from kvstore.cli import main; sys.argv = ['kvstore', 'serve', *sys.argv[1:]]; main()"
)


class Recorder:
    """Both ends at once."""

    def __init__(self, watch: Watch, pid: int, folder: Path) -> None:
        self._watch = watch
        self._pid = pid
        self._folder = folder
        self._number = 0

    def record(self, work: Any) -> set[tuple[str, str]]:
        """What both processes call while `work` runs."""
        on = self._folder / "on"
        on.unlink(missing_ok=True)
        os.kill(self._pid, signal.SIGUSR1)
        while not on.exists():
            time.sleep(0.01)
        self._watch.take()
        self._watch.is_on = True
        try:
            work()
            time.sleep(AFTER_S)
        finally:
            self._watch.is_on = False
        os.kill(self._pid, signal.SIGUSR1)
        part = self._folder / str(self._number)
        self._number += 1
        while not part.exists():
            time.sleep(0.01)
        return self._watch.take() | {(path, name) for path, name in json.loads(part.read_text())}


def main() -> None:
    """Run and print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--list", action="store_true", help="also print every function")
    options = arguments.parse_args()
    watch = Watch()
    from tests.support.daemon import DaemonProcess
    from tests.support.sessions import PATIENT, client_of
    from tests.support.synthetic import make_layers, make_layout, make_namespace

    layout = make_layout(layers=4, heads=2, width=64)
    first, second = list(range(600)), list(range(1000, 1600))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = PROGRAM.format(root=str(ROOT), folder=name)
        with DaemonProcess(folder / "data", profile="safe", program=program) as daemon, client_of(daemon) as client:
            assert daemon.process is not None
            session = client.session(make_namespace(layout), **PATIENT)  # type: ignore[arg-type]
            layers = make_layers(layout, second)
            assert session.store(first, make_layers(layout, first), wait=True).durable and session.fetch(first)
            time.sleep(AFTER_S)
            recorder = Recorder(watch, daemon.process.pid, folder)
            idle = recorder.record(lambda: time.sleep(IDLE_S))
            paths = {
                "STORE": recorder.record(lambda: session.store(second, layers, wait=True)) - idle,
                "FETCH": recorder.record(lambda: session.fetch(second)) - idle,
            }
    for name, seen in paths.items():
        print(f"{name}: {len({file for file, _ in seen})} files, {len(seen)} functions")
        if options.list:
            for file, function in sorted(seen):
                print(f"    {file}: {function}")


if __name__ == "__main__":
    main()
