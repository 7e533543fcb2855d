"""A client that does not trust whoever listens: sockets, directories and peers."""

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

from kvstore.client import trust, uploader
from kvstore.client.client import Client
from kvstore.client.session import Session
from kvstore.client.trust import SocketGuard
from kvstore.client.uploader import UploadConnection
from kvstore.core.blocks import Reason
from kvstore.core.unix_sockets import peer_uid
from kvstore.errors import UnavailableError, UntrustedError
from kvstore.server.storing.upload_socket import UPLOAD_ID_BYTES
from kvstore.wire.v1 import kvstore_pb2 as pb
from tests.support.fake_daemon import FakeDaemon, FakeUpload
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=2, width=64)
TOKENS = list(range(600))
LAYERS = make_layers(LAYOUT, TOKENS)
SLOW = {"connect_ms": 30_000, "stall_ms": 30_000, "total_ms": 60_000}
NOBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes another user id")


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    """A daemon that remembers every call that it gets."""
    with FakeDaemon(make_namespace(LAYOUT)) as fake:
        yield fake


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


# -- the upload socket -------------------------------------------------------------------------------------------------


def test_a_socket_that_was_not_offered_gets_no_byte(daemon: FakeDaemon, session: Session) -> None:
    """After it turned out to be out of reach a worker asks for none, and takes none."""
    socket_path = daemon.directory / "s.store"
    socket_path.rename(daemon.directory / "away")
    assert session.store(TOKENS, LAYERS, wait=True).durable
    (daemon.directory / "away").rename(socket_path)
    daemon.faults = {"socket_unasked"}
    more = [*TOKENS, 1]
    assert session.store(more, make_layers(LAYOUT, more), wait=True).reason is Reason.INTERNAL
    assert not daemon.uploads[-1].data


@pytest.mark.parametrize("trick", ["uid", "mode", "link", "file"])
def test_an_upload_socket_of_somebody_else_gets_no_byte(
    daemon: FakeDaemon, session: Session, monkeypatch: pytest.MonkeyPatch, trick: str
) -> None:
    """It is trusted as the daemon's own socket is: by its way, its mode and the process that listens."""
    path = daemon.directory / "s.store"
    if trick == "uid":
        monkeypatch.setattr(uploader, "peer_uid", lambda connection: 4242)
    elif trick == "mode":
        path.chmod(0o666)
    else:
        path.unlink()
        if trick == "file":
            path.touch()
        else:
            (daemon.directory / "open").mkdir()
            (daemon.directory / "open").chmod(0o777)
            path.symlink_to("open/s")
    assert session.store(TOKENS, LAYERS, wait=True).reason is Reason.UNTRUSTED
    assert [(upload.ended, upload.data) for upload in daemon.uploads] == [("aborted", b"")]


def test_all_bytes_are_sent_over_any_number_of_views(daemon: FakeDaemon) -> None:
    """Over more than a system call takes, and calls that send a part."""
    upload = FakeUpload(pb.BeginStoreRequest(), pb.BeginStoreReply(upload_id="u".ljust(UPLOAD_ID_BYTES, "-")))
    daemon.uploads.append(upload)
    views = [memoryview(bytes([number % 256]) * (number % 5 * 1000)) for number in range(3000)]
    connection = UploadConnection(f"{daemon.directory}/s.store", upload.reply.upload_id, 10.0)
    assert connection.send(iter(views))
    connection.close()
    assert upload.data == b"".join(views)
