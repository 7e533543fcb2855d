"""A whole daemon on a disk that fails: hits stay hits, it says what is wrong, and goes on by itself afterwards."""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore.client.client import Client, connect
from tests.faults import cuts, disk
from tests.support.child import STOP_TIMEOUT_S
from tests.support.daemon import DaemonProcess, run_cli
from tests.support.limits import small_config
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=2, width=64)
NAMESPACE = make_namespace(LAYOUT)
PATIENT: dict[str, Any] = {"connect_ms": 10_000, "stall_ms": 20_000, "total_ms": 30_000}
KEPT, MORE = list(range(600)), list(range(5000, 6500))
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def health(daemon: DaemonProcess, service: str) -> int:
    """What the daemon says of a service."""
    with grpc.insecure_channel(daemon.listen) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=60).status)


def client_of(daemon: DaemonProcess) -> Client:
    """A client that knows nothing yet."""
    return connect(config=small_config(daemon.listen))


def stored(daemon: DaemonProcess, tokens: list[int]) -> bool:
    """Store; whether it was acknowledged as durable."""
    with client_of(daemon) as client:
        return bool(client.session(NAMESPACE, **PATIENT).store(tokens, make_layers(LAYOUT, tokens), wait=True).durable)


def fetched(daemon: DaemonProcess, tokens: list[int]) -> int:
    """Fetch by stream and compare; how many tokens came."""
    with client_of(daemon) as client:
        hit = client.session(NAMESPACE, **PATIENT).fetch([*tokens, 1], "packed", "stream")
    if hit:
        assert_rows(hit.layers, LAYOUT, tokens[: hit.n_tokens])
    return hit.n_tokens if hit else 0


def state(daemon: DaemonProcess) -> str:
    """As `kvstore stats` tells it."""
    with client_of(daemon) as client:
        return str(client.stats()["daemon"]["state"])


def eventually(answer: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait until the answer is true."""
    give_up_at = time.monotonic() + timeout_s
    while not answer():
        assert time.monotonic() < give_up_at
        time.sleep(0.1)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """One that keeps everything raw, with something in it."""
    with DaemonProcess(tmp_path / "data", profile="raw") as running:
        assert stored(running, KEPT)
        yield running


@pytest.mark.skipif(bool(cuts.missing()), reason=f"NOT RUN: {cuts.missing()}")
def test_a_full_disk_is_said_and_passes(tmp_path: Path) -> None:
    """In stats and in the health of writes; hits go on all the while."""
    with (
        disk.mounted(tmp_path / "volume", "size=12m") as data_dir,
        DaemonProcess(data_dir, profile="raw", budget_bytes="1GB") as daemon,
    ):
        assert stored(daemon, KEPT) and health(daemon, "kvstore.writes") == SERVING
        disk.fill(tmp_path / "volume", 40)
        assert not stored(daemon, MORE)
        eventually(lambda: state(daemon) == "degraded")
        eventually(lambda: health(daemon, "kvstore.writes") == NOT_SERVING)
        assert health(daemon, "") == SERVING and fetched(daemon, KEPT) == len(KEPT)
        with client_of(daemon) as client:
            assert "free some" in client.stats()["daemon"]["detail"]
        (tmp_path / "volume" / "filler").unlink()
        eventually(lambda: state(daemon) == "serving" and health(daemon, "kvstore.writes") == SERVING)
        assert stored(daemon, MORE) and fetched(daemon, MORE) == len(MORE)
        assert daemon.log_text().count(" WARNING nothing is stored any more: the volume has") == 1
        assert daemon.log_text().count(" INFO stores are taken again") == 1
        daemon.kill()


@pytest.mark.skipif(bool(cuts.missing()), reason=f"NOT RUN: {cuts.missing()}")
def test_a_store_by_path_that_finds_the_volume_full_displaces_what_is_older(tmp_path: Path) -> None:
    """A worker that fills the volume before the daemon has made room hands its bytes over by stream."""
    with (
        disk.mounted(tmp_path / "volume", "size=12m") as data_dir,
        DaemonProcess(data_dir, profile="raw", budget_bytes="1GB") as daemon,
    ):
        for first in range(4):
            assert stored(daemon, [first, *MORE])
        disk.fill(tmp_path / "volume", 200)
        assert stored(daemon, MORE) and fetched(daemon, MORE) == len(MORE)
        eventually(lambda: state(daemon) == "serving" and health(daemon, "kvstore.writes") == SERVING)
        daemon.kill()


def _all_of_it(data_dir: Path) -> None:
    shutil.rmtree(data_dir)


def _all_in_it(data_dir: Path) -> None:
    for path in data_dir.iterdir():
        path.unlink() if path.is_file() else shutil.rmtree(path)


def _another_in_its_place(data_dir: Path) -> None:
    data_dir.rename(data_dir.with_name("moved"))
    data_dir.mkdir(mode=0o700)


def _blobs(data_dir: Path) -> None:
    shutil.rmtree(data_dir / "blobs.noindex")


@pytest.mark.parametrize("lose", [_all_of_it, _all_in_it, _another_in_its_place, _blobs])
def test_a_directory_that_is_deleted_under_a_daemon_is_begun_anew(
    daemon: DaemonProcess, lose: Callable[[Path], None]
) -> None:
    """Misses, said in stats and health, and then, by itself and in the same process, an empty store."""
    assert daemon.process is not None
    lose(daemon.data_dir)
    assert fetched(daemon, KEPT) == 0
    eventually(lambda: health(daemon, "kvstore.writes") == NOT_SERVING)
    assert state(daemon) == "degraded"
    eventually(lambda: "starting again" in daemon.log_text())
    daemon.wait_serving()
    eventually(lambda: health(daemon, "kvstore.writes") == SERVING and state(daemon) == "serving")
    assert fetched(daemon, KEPT) == 0
    assert stored(daemon, KEPT) and fetched(daemon, KEPT) == len(KEPT)
    with client_of(daemon) as client:
        assert client.check()["findings"] == []
    assert daemon.process.poll() is None and daemon.stop() == 0
    assert "Traceback" not in daemon.log_text()
    daemon.start()
    assert fetched(daemon, KEPT) == len(KEPT)


def test_a_daemon_whose_directory_cannot_be_made_again_ends_with_a_word(tmp_path: Path) -> None:
    """Its volume is gone, for one: not zero, so that launchd or systemd tries again later."""
    (tmp_path / "volume").mkdir()
    with DaemonProcess(tmp_path / "volume" / "data", profile="raw") as daemon:
        daemon.log_path = tmp_path / "log"
        daemon.restart()
        assert daemon.process is not None
        shutil.rmtree(tmp_path / "volume")
        assert daemon.process.wait(STOP_TIMEOUT_S) == 1
        assert "does not exist: mount the volume" in daemon.log_text() and "Traceback" not in daemon.log_text()


@pytest.mark.skipif(bool(cuts.missing()), reason=f"NOT RUN: {cuts.missing()}")
@pytest.mark.parametrize("data_dir", ["volume/data", "volume"])
def test_beneath_a_volume_that_is_unmounted_nothing_is_made(tmp_path: Path, data_dir: str) -> None:
    """Neither by the running daemon, nor by one that is started, nor by `check`; connected again, it is used again."""
    volume = tmp_path / "volume"
    daemon = DaemonProcess(tmp_path / data_dir, profile="raw")
    daemon.log_path = tmp_path / "log"
    with disk.mounted(volume), daemon:
        assert stored(daemon, KEPT) and daemon.process is not None
        disk.unmount(volume)
        eventually(lambda: "is away" in daemon.log_text())
        assert daemon.stop() == 0 and "Traceback" not in daemon.log_text()
        said = f"no store at {daemon.data_dir}; to make one: kvstore serve --create --data-dir {daemon.data_dir}"
        for command in (["serve"], ["check"], ["check", "--repair"]):
            ended = run_cli(command, daemon.environ())
            assert ended.returncode == 1 and said in ended.stderr and "Traceback" not in ended.stderr
        assert list(volume.iterdir()) == []
        disk.mount(volume)
        daemon.start()
        assert stored(daemon, KEPT) and fetched(daemon, KEPT) == len(KEPT)
        assert daemon.stop() == 0


def test_a_daemon_without_descriptors_condemns_nothing_and_goes_on_later(daemon: DaemonProcess) -> None:
    """What it cannot open for want of a descriptor is not damaged."""
    assert daemon.process is not None
    pid = daemon.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with client_of(daemon) as client:
        session = client.session(NAMESPACE, **PATIENT)
        assert session.match([*KEPT, 1]).n_tokens == len(KEPT)
        opened = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (opened, hard))
        for _ in range(3):
            hit = session.fetch([*KEPT, 1], "packed", "stream")
            if hit:
                assert_rows(hit.layers, LAYOUT, KEPT[: hit.n_tokens])
            session.store(MORE, make_layers(LAYOUT, MORE), wait=True)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert daemon.process.poll() is None
    eventually(lambda: state(daemon) == "serving")
    assert fetched(daemon, KEPT) == len(KEPT)
    assert stored(daemon, MORE) and fetched(daemon, MORE) == len(MORE)
    with client_of(daemon) as client:
        assert client.check()["findings"] == [] and client.stats()["disk"]["quarantined"] == 0


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_damaged_index_is_rebuilt_at_the_next_start(daemon: DaemonProcess, how: str) -> None:
    """Whether or not the last stop was orderly; the damaged one is kept for a look."""
    daemon.stop() if how == "stop" else daemon.kill()
    path = daemon.data_dir / "index" / "data.mdb"
    data = bytearray(path.read_bytes())
    for at in range(2 * 4096, len(data), 4096):
        data[at + 12 : at + 16] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    daemon.start()
    assert "is damaged" in daemon.log_text()
    assert fetched(daemon, KEPT) == len(KEPT)
    assert [file.suffix for file in daemon.files("quarantine")] == [".mdb"]
    with client_of(daemon) as client:
        assert client.check()["findings"] == []
