"""A client that does not trust whoever listens: sockets, directories, peers, and the files it is asked to write."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.client import trust
from kvstore.client.client import Client
from kvstore.client.session import Session
from kvstore.client.staged import write_staged
from kvstore.client.trust import SocketGuard, peer_uid
from kvstore.core.blocks import Reason
from kvstore.errors import KVStoreError, UnavailableError, UntrustedError
from tests.support.fake_daemon import FakeDaemon
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=2, width=64)
TOKENS = list(range(600))
LAYERS = make_layers(LAYOUT, TOKENS)
SLOW = {"connect_ms": 5000, "stall_ms": 5000, "total_ms": 20_000}
NOBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes another user id")


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    """A daemon that remembers every call that it gets."""
    fake = FakeDaemon(make_namespace(LAYOUT)).start()
    yield fake
    fake.close()


@pytest.fixture
def session(daemon: FakeDaemon) -> Iterator[Session]:
    """A session of it."""
    with Client(daemon.config()) as client:
        yield client.session(daemon.namespace, **SLOW)


@pytest.fixture
def place() -> Iterator[Path]:
    """A short directory of our own, for sockets."""
    made = Path(tempfile.mkdtemp(prefix="kvt-"))
    yield made
    shutil.rmtree(made)


def bound(path: Path) -> socket.socket:
    """A socket that listens, closed to others."""
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    path.chmod(0o600)
    made.listen()
    return made


def refused(path: Path) -> str:
    """What the guard says of a socket that it must not trust."""
    with pytest.raises(UntrustedError) as raised:
        SocketGuard(str(path)).check()
    return str(raised.value)


def assert_nothing_said(daemon: FakeDaemon, session: Session) -> None:
    """Neither a prompt nor a salt, by any verb."""
    assert session.fetch(TOKENS).reason is Reason.UNTRUSTED
    assert session.match(TOKENS).reason is Reason.UNTRUSTED
    assert session.fetch_layers(TOKENS).reason is Reason.UNTRUSTED
    assert session.store(TOKENS, LAYERS, wait=True).reason is Reason.UNTRUSTED
    assert daemon.calls == []


def test_a_daemon_of_another_user_gets_neither_prompt_nor_salt(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel says whose process listens. One warning names the user, and once it is ours everything works."""
    with Client(daemon.config()) as client, monkeypatch.context() as patched:
        patched.setattr(trust, "peer_uid", lambda connection: 4242)
        session = client.session(daemon.namespace, **SLOW)
        assert_nothing_said(daemon, session)
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1 and "user id 4242" in warnings[0]
        patched.undo()
        assert session.store(TOKENS, LAYERS, wait=True).durable


@as_root
def test_a_socket_that_another_user_made_is_not_connected_to(place: Path) -> None:
    """A process under another user id listens where a daemon is expected, and hears of nobody."""
    place.chmod(0o755)
    theirs = place / "theirs"
    theirs.mkdir()
    os.chown(theirs, NOBODY, NOBODY)
    program = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print(flush=True)\n"
        "s.accept(); print('connected', flush=True)"
    )
    command = ["setpriv", f"--reuid={NOBODY}", "--clear-groups", "/usr/bin/env", "python3", "-c", program]
    with subprocess.Popen([*command, str(theirs / "s")], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline()
        try:
            assert "belongs to user id 65534" in refused(theirs / "s")
            # The directory is ours and sound, the socket is not.
            os.chown(theirs, 0, 0)
            assert "belongs to user id 65534" in refused(theirs / "s")
            # Even a socket that looks like ours is asked who listens.
            os.chown(theirs / "s", 0, 0)
            (theirs / "s").chmod(0o600)
            assert "is of user id 65534" in refused(theirs / "s")
        finally:
            other.send_signal(signal.SIGKILL)
        # All but the last were refused before anything connected; that one was the probe.
        assert other.stdout.read() in ("", "connected\n")


def test_a_directory_that_others_can_write_to_is_named_with_the_fix(place: Path) -> None:
    """The socket's own, and any above it: whoever may write there can put another socket in its place."""
    (place / "a").mkdir(0o700)
    (place / "a" / "b").mkdir(0o700)
    path = place / "a" / "b" / "s"
    with bound(path):
        SocketGuard(str(path)).check()
        for directory in (path.parent, path.parent.parent):
            for mode in (0o720, 0o702):
                directory.chmod(mode)
                assert f"chmod go-w {directory}" in refused(path)
            directory.chmod(0o700)
        path.chmod(0o620)
        assert "open to other users" in refused(path)


def test_a_sticky_directory_holds_directories_but_no_socket(place: Path) -> None:
    """In /tmp others cannot rename what is ours, but they can be first to make a name."""
    place.chmod(0o1777)
    with bound(place / "s"):
        assert "other users can write" in refused(place / "s")
    (place / "mine").mkdir(0o700)
    with bound(place / "mine" / "s"):
        SocketGuard(str(place / "mine" / "s")).check()


def test_links_are_followed_as_the_kernel_follows_them(place: Path) -> None:
    """Each directory on the way counts, that of a link too; a ring of links ends."""
    (place / "real").mkdir(0o700)
    (place / "open").mkdir(0o700)
    (place / "open" / "link").symlink_to("../real")
    path = place / "open" / "link" / "s"
    with bound(place / "real" / "s"):
        SocketGuard(str(path)).check()
        (place / "open").chmod(0o777)
        assert f"chmod go-w {place / 'open'}" in refused(path)
    (place / "ring").symlink_to("ring")
    assert "links" in refused(place / "ring" / "s")


def test_a_missing_directory_is_no_daemon_and_is_not_waited_for(place: Path) -> None:
    """Another user may make it, so gRPC must not go on trying to connect there."""
    with pytest.raises(UnavailableError, match="nowhere"):
        SocketGuard(str(place / "nowhere" / "s")).check()
    SocketGuard(str(place / "s")).check()
    (place / "file").touch()
    assert "is not a socket" in refused(place / "file")


def test_the_peer_is_asked_for_once_for_each_socket(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that was restarted made a new one."""
    asked: list[int] = []
    monkeypatch.setattr(trust, "peer_uid", lambda connection: asked.append(uid := peer_uid(connection)) or uid)
    guard = SocketGuard(str(place / "s"))
    for _ in range(2):
        with bound(place / "s"):
            guard.check()
            guard.check()
        (place / "s").unlink()
    assert asked == [os.geteuid()] * 2


# -- staging files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lie", ["victim", "outside", "held", "second_name", "fifo", "relative"])
def test_a_daemon_that_lies_makes_a_worker_write_to_no_file(
    daemon: FakeDaemon, session: Session, tmp_path: Path, lie: str
) -> None:
    """Neither outside of the directory that it named, nor into a file with bytes in it, or with two names."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    inside = daemon.directory / "inside"
    inside.touch()
    empty = tmp_path / "empty"
    empty.touch()
    if lie == "held":
        inside.write_bytes(b"precious")
    elif lie == "second_name":
        inside.unlink()
        os.link(empty, inside)
    elif lie == "fifo":
        inside.unlink()
        os.mkfifo(inside)
    elif lie == "outside":
        (daemon.directory / "deeper").mkdir()
        (daemon.directory / "deeper" / "inside").touch()
    daemon.staging_lie = {
        "victim": str(victim),
        "outside": str(daemon.directory / "deeper" / "inside"),
        "relative": f"{daemon.directory}/../{daemon.directory.name}/inside",
    }.get(lie, str(inside))
    result = session.store(TOKENS, LAYERS, wait=True)
    assert result.reason is (Reason.INTERNAL if lie == "fifo" else Reason.UNTRUSTED)
    assert [upload.ended for upload in daemon.uploads] == ["aborted"]
    assert victim.read_bytes() == b"precious" and not empty.read_bytes()
    assert lie == "fifo" or inside.read_bytes() == (b"precious" if lie == "held" else b"")


def test_a_staging_path_that_was_not_asked_for_is_refused(daemon: FakeDaemon, session: Session) -> None:
    """After files turned out to be unusable a worker asks for none, and takes none."""
    daemon.faults = {"staging_elsewhere"}
    assert session.store(TOKENS, LAYERS, wait=True).durable
    daemon.faults = {"staging_unasked"}
    more = [*TOKENS, 1]
    assert session.store(more, make_layers(LAYOUT, more), wait=True).reason is Reason.UNTRUSTED
    assert not Path(daemon.uploads[-1].reply.staging_path).read_bytes()


def test_a_staging_file_gets_exactly_the_bytes_announced(tmp_path: Path) -> None:
    """Over any number of views and short writes; a difference is an error, a missing file too."""
    directory, path = str(tmp_path), tmp_path / "staging"
    path.touch()
    views = [memoryview(bytes([number % 256]) * (number % 5)) for number in range(3000)]
    write_staged(directory, str(path), iter(views), sum(map(len, views)))
    assert path.read_bytes() == b"".join(views)
    (tmp_path / "other").touch()
    with pytest.raises(KVStoreError, match="3 bytes captured where 4 are wanted"):
        write_staged(directory, str(tmp_path / "other"), iter([memoryview(b"abc")]), 4)
    with pytest.raises(FileNotFoundError):
        write_staged(directory, str(tmp_path / "none"), iter([]), 0)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_staged(directory, str(tmp_path / "folder"), iter([]), 0)


def test_a_staging_directory_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    """They could put their own file there between its making and the writing."""
    (tmp_path / "staging").touch()
    tmp_path.chmod(0o777)
    with pytest.raises(UntrustedError, match="not ours alone"):
        write_staged(str(tmp_path), str(tmp_path / "staging"), iter([]), 0)
