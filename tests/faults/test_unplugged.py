"""A data directory on a disk that is unplugged while the daemon serves from it, and comes back: nothing is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.blobs import ranges
from kvstore.core.blocks import Reason, pack_tokens
from kvstore.core.keys import Chain
from kvstore.engine import Engine, Fs
from kvstore.errors import DirectoryError
from tests.faults import cuts, disk
from tests.faults.test_daemon_disk import KEPT, MORE, NAMESPACE, PATIENT, client_of, eventually, fetched, stored
from tests.faults.workload import NS
from tests.support.daemon import DaemonProcess, run_cli
from tests.support.engine import find, options, put, require_sound
from tests.support.synthetic import make_layers

SHM = Path("/dev/shm")  # another device than that of the tests
LAYOUT = NAMESPACE.layout


class Disk:
    """A volume that can be pulled and plugged in again: a link to another device, or a bind mount of one."""

    def __init__(self, at: Path, real: Path, *, mounts: bool) -> None:
        self.at, self.real, self.mounts = at, real, mounts
        if mounts:
            at.mkdir(mode=0o700)

    def plug(self) -> None:
        """It is there."""
        if self.mounts:
            disk.bind(self.real, self.at)
        else:
            self.at.symlink_to(self.real)

    def pull(self) -> None:
        """It is gone, whoever uses it."""
        if self.mounts:
            disk.unmount(self.at)
        else:
            self.at.unlink()


MOUNTED = pytest.param(True, marks=pytest.mark.skipif(bool(cuts.missing()), reason=f"NOT RUN: {cuts.missing()}"))


@pytest.fixture(params=[False, MOUNTED], ids=["link", "mount"])
def volume(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """A disk that is plugged in."""
    if not SHM.is_dir() or SHM.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second device here")
    real = Path(tempfile.mkdtemp(prefix="kvstore-disk-", dir=SHM))
    found = Disk(tmp_path / "volume", real, mounts=request.param)
    found.plug()
    try:
        yield found
    finally:
        if os.path.ismount(found.at):
            disk.unmount(found.at)
        shutil.rmtree(real)


def counts(daemon: DaemonProcess) -> dict[str, Any]:
    """What must not change while the disk is away."""
    with client_of(daemon) as client:
        stats = client.stats()
    return {"blobs": stats["disk"]["blobs"], "quarantined": stats["disk"]["quarantined"], **stats["evictions"]}


def test_a_daemon_goes_on_when_its_disk_comes_back(volume: Disk, tmp_path: Path) -> None:
    """Under fetches and stores: misses, never an error; each way is said once; all that was durable is a hit again."""
    daemon = DaemonProcess(volume.at / "data", profile="raw")
    daemon.log_path = tmp_path / "log"
    with daemon:
        assert stored(daemon, KEPT)
        before, pid = counts(daemon), daemon.process and daemon.process.pid
        seen: list[Any] = []
        over = threading.Event()

        def work() -> None:
            with client_of(daemon) as client:
                session = client.session(NAMESPACE, **PATIENT)
                number = 0
                while not over.is_set():
                    number += 1
                    tokens = [*range(number * 10_000, number * 10_000 + 300)]
                    seen.append(session.fetch([*KEPT, number]).n_tokens)
                    session.store(tokens, make_layers(LAYOUT, tokens))

        worker = threading.Thread(target=work)
        worker.start()
        try:
            eventually(lambda: len(seen) > 3)
            turns = 1 if volume.mounts else 2
            for turn in range(1, turns + 1):
                volume.pull()
                eventually(lambda turn=turn: daemon.log_text().count("is away; every request is a miss") == turn)
                eventually(lambda: seen[-1] == 0)
                ended = run_cli(["stats"], daemon.environ())
                assert ended.returncode == 3 and "is away" in ended.stderr and ended.stderr.count("\n") == 1
                assert not volume.at.is_dir() or not list(volume.at.iterdir())
                volume.plug()
                daemon.wait_serving()
                eventually(lambda: seen[-1] == len(KEPT))
        finally:
            over.set()
            worker.join()
        assert daemon.process and daemon.process.pid == pid
        after = counts(daemon)
        assert after["blobs"] >= before["blobs"]
        assert {**after, "blobs": 0} == {**before, "blobs": 0}
        assert daemon.log_text().count("data is back") == turns and "Traceback" not in daemon.log_text()
        assert stored(daemon, MORE) and fetched(daemon, MORE) == len(MORE)
        assert run_cli(["check"], daemon.environ()).returncode == 0
        assert daemon.stop() == 0


def test_a_daemon_that_ended_with_its_disk_refuses_to_start_without_it(volume: Disk, tmp_path: Path) -> None:
    """As after SIGBUS, by which reading a map of a disk that is gone ends a process: one line, nothing is made."""
    daemon = DaemonProcess(volume.at / "data", profile="raw")
    daemon.log_path = tmp_path / "log"
    with daemon:
        assert stored(daemon, KEPT)
        volume.pull()
        daemon.kill()
        ended = run_cli(["serve"], daemon.environ())
        assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and "no store at" in ended.stderr
        assert "volume is not mounted" in ended.stderr
        assert not volume.at.is_dir() or not list(volume.at.iterdir())
        volume.plug()
        daemon.start()
        assert fetched(daemon, KEPT) == len(KEPT)


@pytest.mark.parametrize("volume", [False], indirect=True, ids=["link"])
def test_a_daemon_that_waits_for_its_disk_can_be_stopped(volume: Disk, tmp_path: Path) -> None:
    """In good order, and it holds its address meanwhile."""
    daemon = DaemonProcess(volume.at / "data", profile="raw")
    daemon.log_path = tmp_path / "log"
    with daemon:
        volume.pull()
        eventually(lambda: "is away; every" in daemon.log_text())
        eventually(lambda: "is away" in run_cli(["stats"], daemon.environ()).stderr)
        other = DaemonProcess(tmp_path / "other", listen=daemon.listen)
        other.start(wait=False)
        assert other.process and other.process.wait(60) == 5
        assert daemon.stop() == 0
        volume.plug()


class Dead(Fs):
    """A disk that answers nothing any more, although it looks as if it were mounted."""

    is_dead = False

    def open(self, path: str, flags: int, mode: int) -> int:
        if self.is_dead:
            raise OSError(6, "No such device or address")
        return super().open(path, flags, mode)


def no_read(*_: object) -> int:
    """What reading gives then."""
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    "look",
    [
        lambda engine, key: engine.recheck(key),
        lambda engine, key: engine.check(repair=True),
        lambda engine, key: [engine.scrub() for _ in range(3)],
    ],
    ids=["recheck", "check", "scrub"],
)
def test_a_disk_that_answers_nothing_damages_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[Engine, bytes], object]
) -> None:
    """Whoever reads meanwhile; a file that a sound disk cannot read is damaged all the same."""
    fs = Dead()
    with Engine.open(tmp_path / "data", options(scrub_bytes_per_s=1 << 30), fs=fs) as engine:
        put(engine, NS, KEPT)
        key = engine.match(Chain(NS.root, pack_tokens(KEPT))).slices[0].row.key
        with monkeypatch.context() as patch:
            fs.is_dead = True
            patch.setattr(ranges.os, "preadv", no_read)
            with contextlib.suppress(DirectoryError):
                look(engine, key)
            assert "does not answer" in engine.degraded
        fs.is_dead = False
        engine.maintain()
        assert find(engine, NS, KEPT).n_tokens == len(KEPT) and engine.stats().quarantined == 0
        require_sound(engine)
        with monkeypatch.context() as patch:
            patch.setattr(ranges.os, "preadv", no_read)
            assert engine.recheck(key)
        assert find(engine, NS, KEPT).n_tokens == 0


def test_the_index_of_a_disk_that_is_away_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LMDB maps it: a page that is not in memory would end the process. A miss with a reason of its own."""
    engine = Engine.open(tmp_path / "data", options())
    put(engine, NS, KEPT)
    (tmp_path / "data").rename(tmp_path / "away")
    with monkeypatch.context() as patch:
        patch.setattr(engine._shared.index, "view", None)
        assert engine.match(Chain(NS.root, pack_tokens(KEPT))).reason is Reason.UNAVAILABLE
    (tmp_path / "away").rename(tmp_path / "data")
    assert find(engine, NS, KEPT).n_tokens == len(KEPT)
    engine.close()
