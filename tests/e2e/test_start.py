"""Starting the daemon: where it refuses, it names the cause and the fix; where it can start, it does."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.config import SOCKET_PATH_BYTES_MAX, automatic_budget_bytes, automatic_floor_bytes
from kvstore.errors import DirectoryHeldError
from kvstore.server.listening import lock_socket
from tests.support.child import STOP_TIMEOUT_S
from tests.support.daemon import SERVE, DaemonProcess, run_cli
from tests.support.files import paths_below
from tests.support.sessions import client_of
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=1, heads=1, width=32)
TOKENS = list(range(100))


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory of our own with a path short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="kvs-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def refused(daemon: DaemonProcess, code: int) -> str:
    """Run the daemon, which must end by itself with `code` and one line of explanation: that line."""
    ended = run_cli(["serve", "--create"], daemon.environ())
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr.splitlines()[-1]


def roundtrip(daemon: DaemonProcess) -> None:
    """Store and fetch back: the daemon does not only say that it serves."""
    with client_of(daemon) as client:
        session = client.session(make_namespace(LAYOUT), "raw", connect_ms=5000, stall_ms=20_000, total_ms=20_000)
        assert session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).stored_tokens == len(TOKENS)
        hit = session.fetch(TOKENS)
        assert hit.n_tokens == len(TOKENS) - 1
        assert_rows(hit.layers, LAYOUT, TOKENS[:-1])


def test_a_second_daemon_on_one_directory_exits_5_and_names_the_holder(tmp_path: Path) -> None:
    """By pid and address; the first goes on."""
    with DaemonProcess(tmp_path / "data") as first:
        second = DaemonProcess(tmp_path / "data")
        message = refused(second, 5)
        assert first.process is not None
        assert f"pid {first.process.pid}" in message and first.listen in message
        assert list(Path(second.listen.removeprefix("unix:")).parent.iterdir()) == []
        roundtrip(first)


def test_a_second_daemon_on_one_socket_is_refused_and_disturbs_nobody(tmp_path: Path) -> None:
    """gRPC alone would bind over the first one's socket, and remove it in the end."""
    with DaemonProcess(tmp_path / "first") as first:
        message = refused(DaemonProcess(tmp_path / "second", listen=first.listen), 5)
        assert first.process is not None
        assert f"pid {first.process.pid}" in message and first.listen in message
        assert not (tmp_path / "second").exists()
        roundtrip(first)


def test_a_daemon_that_ends_leaves_nothing_beside_its_socket(tmp_path: Path, short_dir: Path) -> None:
    """A lock that was removed by whoever held it locks nothing: the next daemon makes its own."""
    with DaemonProcess(tmp_path / "data", listen=f"unix:{short_dir}/s") as daemon:
        assert daemon.stop() == 0 and list(short_dir.iterdir()) == []
    lock = short_dir / "s.lock"
    first = lock_socket(lock, "here")
    with pytest.raises(DirectoryHeldError, match=f"pid {os.getpid()}"):
        lock_socket(lock, "here")
    lock.unlink()
    second = lock_socket(lock, "here")
    os.close(first)
    with pytest.raises(DirectoryHeldError):
        lock_socket(lock, "here")
    os.close(second)


def test_a_tcp_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    """Two servers would share it in silence if SO_REUSEPORT were left on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with DaemonProcess(tmp_path / "first", listen=address) as first:
        assert f"cannot listen on {address}" in refused(DaemonProcess(tmp_path / "second", listen=address), 1)
        roundtrip(first)


def test_a_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    """What SIGKILL leaves behind is no obstacle, and an orderly stop leaves nothing."""
    daemon = DaemonProcess(tmp_path / "data")
    socket_file = Path(daemon.listen.removeprefix("unix:"))
    with daemon:
        daemon.kill()
        assert socket_file.is_socket()
        daemon.start()
        roundtrip(daemon)
        assert daemon.stop() == 0
        assert not socket_file.exists()


def test_a_file_in_place_of_the_socket_is_left_alone(tmp_path: Path, short_dir: Path) -> None:
    """It may be somebody's work."""
    path = short_dir / "s"
    path.write_text("notes")
    message = refused(DaemonProcess(tmp_path / "data", listen=f"unix:{path}"), 1)
    assert str(path) in message and "remove it" in message
    assert path.read_text() == "notes"


def test_a_data_directory_that_others_can_read_is_refused_with_the_fix(tmp_path: Path) -> None:
    """Doing what the message says is enough."""
    daemon = DaemonProcess(tmp_path / "data")
    daemon.data_dir.mkdir(mode=0o700)
    daemon.data_dir.chmod(0o750)
    fix = f"chmod 700 {daemon.data_dir}"
    assert fix in refused(daemon, 1)
    assert list(daemon.data_dir.iterdir()) == []
    subprocess.run(fix.split(), check=True)
    with daemon:
        roundtrip(daemon)


def test_all_that_a_daemon_makes_is_closed_to_others(tmp_path: Path) -> None:
    """Whatever umask it was started with."""
    before = os.umask(0)
    try:
        with DaemonProcess(tmp_path / "data") as daemon:
            roundtrip(daemon)
            made = {path: path.lstat() for path in (daemon.data_dir, Path(daemon.listen.removeprefix("unix:")))}
            made |= paths_below(daemon.data_dir)
            assert {str(path): info.st_mode & 0o077 for path, info in made.items() if info.st_mode & 0o077} == {}
    finally:
        os.umask(before)


def test_a_socket_directory_open_to_others_is_refused_with_the_fix(tmp_path: Path, short_dir: Path) -> None:
    """Whoever can enter it could connect."""
    short_dir.chmod(0o755)
    daemon = DaemonProcess(tmp_path / "data", listen=f"unix:{short_dir}/s")
    fix = f"chmod 700 {short_dir}"
    assert f"{fix}," in refused(daemon, 1)
    subprocess.run(fix.split(), check=True)
    with daemon:
        roundtrip(daemon)


def test_a_socket_in_a_shared_directory_is_refused_without_advice_that_would_close_it(tmp_path: Path) -> None:
    """`chmod 700 /tmp` would break the machine; a place of one's own is named instead."""
    message = refused(DaemonProcess(tmp_path / "data", listen="unix:/tmp/kvstore-test.sock"), 1)
    assert "/tmp is shared with other users" in message and "unix:~/.kvstore/kvstore.sock" in message
    assert "chmod" not in message
    assert not Path("/tmp/kvstore-test.sock").exists()


def test_a_store_in_a_directory_of_ones_own_is_made_only_when_that_is_said(tmp_path: Path) -> None:
    """An empty mount point, a folder of other things, a place where nothing is; afterwards it needs no flag."""
    daemon = DaemonProcess(tmp_path / "data")
    (tmp_path / "others").mkdir(mode=0o700)
    (tmp_path / "others" / "notes").write_text("mine")
    (tmp_path / "empty").mkdir(mode=0o700)
    for place in ("data", "empty", "others"):
        for verb in (["serve"], ["check"], ["check", "--repair"]):
            ended = run_cli(verb, {**daemon.environ(), "KVSTORE_DATA_DIR": str(tmp_path / place)})
            assert ended.returncode == 1 and "Traceback" not in ended.stderr
            told = f"no store at {tmp_path / place}; to make one: kvstore serve --create --data-dir {tmp_path / place}"
            assert told in ended.stderr
    assert not daemon.data_dir.exists() and not list((tmp_path / "empty").iterdir())
    assert [path.name for path in (tmp_path / "others").iterdir()] == ["notes"]
    with daemon:
        roundtrip(daemon)
        assert daemon.stop() == 0
        assert daemon.start(wait=False).process is not None
        daemon.wait_serving()
        assert "--create" not in daemon.process.args


def test_the_default_directory_needs_no_flag(tmp_path: Path) -> None:
    """It is in the user's home; nothing is mounted there."""
    daemon = DaemonProcess(tmp_path / "data")
    environ = {**daemon.environ(), "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "share")}
    del environ["KVSTORE_DATA_DIR"]
    with daemon.log_path.open("ab") as log:
        command = [sys.executable, "-m", "kvstore", "serve"]
        daemon.process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    try:
        daemon.wait_serving()
        assert (tmp_path / "share" / "kvstore" / "id").exists() or sys.platform == "darwin"
    finally:
        daemon.kill()


def test_it_starts_in_an_empty_environment(tmp_path: Path, short_dir: Path) -> None:
    """No HOME, no locale, no TMPDIR: as launchd and systemd start things."""
    daemon = DaemonProcess(tmp_path / "data", listen=f"unix:{short_dir}/s")
    bare = ["env", "-i", "PATH=/usr/bin:/bin", sys.executable, "-m", "kvstore"]
    flags = ["--data-dir", str(daemon.data_dir), "--listen", daemon.listen, "--free-floor-bytes", "1"]
    with daemon.log_path.open("ab") as log:
        daemon.process = subprocess.Popen([*bare, "serve", "--create", *flags], stdout=log, stderr=log, cwd="/")
    try:
        daemon.wait_serving()
        roundtrip(daemon)
    finally:
        daemon.kill()
    shown = subprocess.run([*bare, "config", "show"], capture_output=True, text=True, cwd="/", check=False)
    assert shown.returncode == 0, shown.stderr


def test_budget_and_floor_come_from_the_volume_when_none_are_set(tmp_path: Path) -> None:
    """Over a store that was filled before, which an automatic budget must not empty."""
    with DaemonProcess(tmp_path / "data") as daemon:
        roundtrip(daemon)
        daemon.restart(budget_bytes="0", free_floor_bytes="0")
        with client_of(daemon) as client:
            disk = client.stats()["disk"]
        assert disk["blobs"] == 1
        volume = os.statvfs(tmp_path)
        assert disk["free_floor_bytes"] == automatic_floor_bytes(volume.f_blocks * volume.f_frsize)
        # Others write to the volume meanwhile.
        assert disk["budget_bytes"] == pytest.approx(automatic_budget_bytes(disk["free_bytes"]), rel=0.05)


def test_a_data_directory_below_a_missing_parent_is_refused_and_not_made(tmp_path: Path) -> None:
    """Its volume is probably not mounted, and the boot disk is no place for it."""
    daemon = DaemonProcess(tmp_path / "disk" / "data")
    daemon.log_path = tmp_path / "log"
    message = refused(daemon, 1)
    assert f"{tmp_path}/disk does not exist" in message
    assert "mount the volume" in message and f"mkdir -p {tmp_path}/disk" in message
    assert not (tmp_path / "disk").exists()


def test_a_volume_that_is_not_mounted_is_named(tmp_path: Path) -> None:
    """Below /Volumes a folder without a volume is on the boot disk."""
    message = refused(DaemonProcess(Path("/Volumes/kvstore-no-such-volume/data")), 1)
    assert "/Volumes/kvstore-no-such-volume" in message and "not mounted" in message
    assert not Path("/Volumes/kvstore-no-such-volume").exists()


def make_fat_image(path: Path) -> None:
    """An empty 4 MiB FAT12 volume, byte by byte, since mkfs.vfat is seldom installed."""
    sectors, fat_sectors = 8192, 8
    boot = bytearray(512)
    boot[:11] = b"\xeb\x3c\x90MSDOS5.0"
    struct.pack_into("<HBHBHHBHHHII", boot, 11, 512, 4, 1, 2, 512, sectors, 0xF8, fat_sectors, 32, 2, 0, 0)
    boot[36:62] = struct.pack("<BBBI", 0x80, 0, 0x29, 1) + b"KVSTORE    FAT12   \0"[:19]
    boot[510:] = b"\x55\xaa"
    fat = bytearray(fat_sectors * 512)
    fat[:3] = b"\xf8\xff\xff"
    path.write_bytes((boot + fat + fat).ljust(sectors * 512, b"\0"))


@pytest.fixture
def fat_volume(tmp_path: Path) -> Iterator[Path]:
    """A mounted FAT volume; skips, saying why, where none can be mounted."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs root on Linux to mount a FAT volume")
    image, volume = tmp_path / "fat.img", tmp_path / "fat"
    volume.mkdir()
    make_fat_image(image)
    command = ["mount", "-t", "vfat", "-o", "loop,umask=022", str(image), str(volume)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"this kernel cannot mount a FAT volume: {mounted.stderr.strip()}")
    yield volume
    subprocess.run(["umount", str(volume)], check=True)


@pytest.mark.parametrize("exists", [False, True])
def test_a_fat_volume_is_named_as_the_cause(tmp_path: Path, fat_volume: Path, exists: bool) -> None:
    """It keeps no modes, so chmod would be no advice."""
    daemon = DaemonProcess(fat_volume / "data")
    daemon.log_path = tmp_path / "log"
    if exists:
        daemon.data_dir.mkdir()
    message = refused(daemon, 1)
    assert "FAT" in message and "APFS, ext4" in message
    assert "chmod" not in message


def test_a_socket_path_of_97_bytes_works_and_one_of_98_names_the_limit(tmp_path: Path, short_dir: Path) -> None:
    """104 with the closing NUL is what macOS takes of the admin socket's; the limit is the same everywhere."""
    longest = str(short_dir / "s").ljust(SOCKET_PATH_BYTES_MAX, "s")
    with DaemonProcess(tmp_path / "data", listen=f"unix:{longest}") as daemon:
        roundtrip(daemon)
    message = refused(DaemonProcess(tmp_path / "data", listen=f"unix:{longest}s"), 2)
    assert "98 bytes" in message and "97" in message and "unix:~/.kvstore/kvstore.sock" in message
    asked = run_cli(["stats", "--address", f"unix:{longest}s"], daemon.environ())
    assert asked.returncode == 2 and "97" in asked.stderr


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("min_quantize_tokens", "-1", "must not be negative"),
        ("profile", "affine7", "bits: 8, 6, 5, 4, 3, 2"),
        ("budget_bytes", "10 bananas", "10GB"),
        ("listen", "0.0.0.0:7000", "insecure_tcp"),
        ("no_such_key", "1", "no such key"),
    ],
)
def test_a_setting_that_cannot_be_ends_the_start_with_2_and_names_the_way_out(
    tmp_path: Path, key: str, value: str, named: str
) -> None:
    """Before the directory is touched, and without a stack trace."""
    daemon = DaemonProcess(tmp_path / "data", **{"insecure_tcp": "false", key: value})
    environ = {**daemon.environ(), f"KVSTORE_{key.upper()}": value}
    ended = run_cli(["serve"], environ)
    assert ended.returncode == 2, ended.stderr
    assert named in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_in_order(tmp_path: Path, number: signal.Signals) -> None:
    """Exit 0 once it serves, whatever comes after it, and the next start finds a clean stop."""
    ignored = signal.signal(number, signal.SIG_DFL)  # what this process ignores, as under nohup, a child would too
    # When the event loop has closed the pipe that signals are written to, and at the very end of the process.
    again = (
        "import asyncio, atexit, os\n"
        f"again, close = lambda: os.kill(os.getpid(), {number:d}), asyncio.BaseEventLoop.close\n"
        "asyncio.BaseEventLoop.close = lambda loop: (again(), close(loop))\n"
        "atexit.register(again)\n"
    )
    with DaemonProcess(tmp_path / "data", program=again + SERVE) as daemon:
        signal.signal(number, ignored)
        assert daemon.process is not None
        daemon.signal(number)
        assert daemon.process.wait(STOP_TIMEOUT_S) == 0, daemon.log_text()
        daemon.start()
        assert "unclean" not in daemon.log_text() and "Traceback" not in daemon.log_text()
        assert stat.S_IMODE(daemon.data_dir.stat().st_mode) == 0o700


def test_a_daemon_that_is_to_outlive_its_terminal_does(tmp_path: Path) -> None:
    """As under `nohup`, which has SIGHUP ignored."""
    daemon = DaemonProcess(tmp_path / "data")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        daemon.start()
    finally:
        signal.signal(signal.SIGHUP, before)
    daemon.signal(signal.SIGHUP)
    roundtrip(daemon)
    assert daemon.stop() == 0


def test_a_stopped_daemon_still_holds_its_directory(tmp_path: Path) -> None:
    """SIGSTOP is not an end: the second must not go ahead."""
    with DaemonProcess(tmp_path / "data") as first:
        first.signal(signal.SIGSTOP)
        assert "is held by" in refused(DaemonProcess(tmp_path / "data"), 5)
        first.signal(signal.SIGCONT)
        roundtrip(first)
