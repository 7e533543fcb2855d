"""TCP with TLS: who gets in with what, and what the others see."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from kvstore.blobs.pack_file import PackFile
from kvstore.client.client import Client, connect
from kvstore.core.blocks import Reason
from kvstore.errors import CredentialsError, ScopeError, UnavailableError
from kvstore.wire.handshake import PROTOCOL_KEY
from tests.support.daemon import DaemonProcess, run_cli
from tests.support.files import files_below, paths_below
from tests.support.limits import small_config
from tests.support.servers import free_port, wait_until
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace
from tests.support.tls import copied, tls_folder

LAYOUT = make_layout(layers=2, heads=1, width=64)
NAMESPACE = make_namespace(LAYOUT)
TOKENS = list(range(300))
CERT = ("config", "cert")
GOLDEN_PACK = Path(__file__).parents[1] / "golden" / "pack-v3.kvpack"
HOSTS = ("--host", "localhost", "--host", "127.0.0.1")
SLOW = {"connect_ms": 30_000, "stall_ms": 30_000, "total_ms": 60_000}


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `kvstore config cert` makes, under a umask that hides nothing."""
    directory = tmp_path_factory.mktemp("access") / "tls"
    before = os.umask(0)
    try:
        made = run_cli([*CERT, "--dir", str(directory), *HOSTS], os.environ)
    finally:
        os.umask(before)
    assert made.returncode == 0, made.stderr
    return directory


def part(tls: Path, end: str, *names: str) -> Path:
    """The folder of an end, with only these of its files: `cert`, `key`, `ca`, `tokens`."""
    return copied(tls / "-".join((end, *names)), tls / end, *names)


def serving(tmp_path_factory: pytest.TempPathFactory, tls_dir: Path) -> DaemonProcess:
    """A daemon on TCP with what the folder has; not started."""
    address = f"127.0.0.1:{free_port()}"
    return DaemonProcess(
        tmp_path_factory.mktemp("daemon") / "data", listen=address, insecure_tcp="false", tls_dir=tls_dir
    )


@contextmanager
def started(daemon: DaemonProcess, tls: Path) -> Iterator[DaemonProcess]:
    """Running and serving: health takes TLS but no token."""
    try:
        daemon.start(wait=False)
        with connecting(daemon, tls / "worker") as client:
            wait_until(lambda: answers(daemon, client), 60, daemon.log_text)
        yield daemon
    finally:
        daemon.kill()


def answers(daemon: DaemonProcess, client: Client) -> bool:
    """Whether the daemon answers a health check; AssertionError when it has ended."""
    assert daemon.process is not None and daemon.process.poll() is None, daemon.log_text()
    try:
        client._connection.ensure(0.3)
    except UnavailableError:
        return False
    return True


def connecting(daemon: DaemonProcess, tls_dir: Path) -> Client:
    """A client with what the folder has."""
    return connect(config=small_config(daemon.listen, tls_dir=str(tls_dir)))


def roundtrip(client: Client) -> None:
    """Store and fetch back."""
    session = client.session(NAMESPACE, "raw", **SLOW)  # type: ignore[arg-type]
    stored = session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True)
    assert stored.stored_tokens == len(TOKENS), stored
    hit = session.fetch(TOKENS)
    assert hit.n_tokens == len(TOKENS) - 1, hit
    assert_rows(hit.layers, LAYOUT, TOKENS[:-1])


def assert_shut_out(client: Client, reason: Reason) -> None:
    """Misses with a reason, in every verb of a session; nothing raised."""
    session = client.session(NAMESPACE, **SLOW)  # type: ignore[arg-type]
    assert session.match(TOKENS).reason is reason
    assert session.fetch(TOKENS).reason is reason
    assert session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).reason is reason


@pytest.fixture(scope="module")
def by_token(tmp_path_factory: pytest.TempPathFactory, tls: Path) -> Iterator[DaemonProcess]:
    """A daemon that asks for tokens."""
    with started(serving(tmp_path_factory, part(tls, "daemon", "cert", "key", "tokens")), tls) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def by_certificate(tmp_path_factory: pytest.TempPathFactory, tls: Path) -> Iterator[DaemonProcess]:
    """A daemon that asks for certificates."""
    with started(serving(tmp_path_factory, part(tls, "daemon", "cert", "key", "ca")), tls) as daemon:
        yield daemon


def test_everything_that_cert_makes_is_closed_to_others(tls: Path) -> None:
    """The umask was 0."""
    assert tls.stat().st_mode & 0o777 == 0o700
    assert {path.name: info.st_mode & 0o777 for path, info in paths_below(tls).items() if info.st_mode & 0o077} == {}
    assert {path.stat().st_mode & 0o777 for path in (tls / "daemon").iterdir()} == {0o600}


def test_cert_replaces_nothing_unless_told_to(tls: Path, tmp_path: Path) -> None:
    """Not even when only one of the files is there."""
    (tmp_path / "tls" / "worker").mkdir(mode=0o700, parents=True)
    (tmp_path / "tls").chmod(0o700)
    (tmp_path / "tls" / "worker" / "tokens").write_text("mine")
    arguments = [*CERT, "--dir", str(tmp_path / "tls")]
    refused = run_cli(arguments, os.environ)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1) and "has worker/tokens already" in refused.stderr
    assert [path.name for path in files_below(tmp_path / "tls")] == ["tokens"]
    assert run_cli([*arguments, "--force"], os.environ).returncode == 0
    assert (tmp_path / "tls" / "worker" / "tokens").read_text() != "mine"
    (tmp_path / "tls").chmod(0o755)
    refused = run_cli([*arguments, "--force"], os.environ)
    assert refused.returncode == 1 and "chmod 700" in refused.stderr
    assert run_cli([*arguments, "--host", "no host"], os.environ).returncode == 2


def test_a_worker_token_stores_and_fetches_and_an_admin_token_does_all(by_token: DaemonProcess, tls: Path) -> None:
    """Admin verbs are a scope of their own."""
    with connecting(by_token, part(tls, "worker", "ca", "tokens")) as worker:
        roundtrip(worker)
        why = functools.partial(worker.why, last=1)
        for verb in (worker.stats, worker.list, why, worker.check, lambda: worker.evict(all=True)):
            with pytest.raises(ScopeError, match="admin"):
                verb()
    with connecting(by_token, part(tls, "admin", "ca", "tokens")) as admin:
        roundtrip(admin)
        assert admin.stats()["disk"]["blobs"] == 2
        assert admin.why(last=9)["found"]
    with connecting(by_token, part(tls, "daemon", "ca", "tokens")) as both:
        assert both.list()["namespaces"]


def test_without_a_known_token_there_are_misses_and_no_answers(by_token: DaemonProcess, tls: Path) -> None:
    """The connection is made, nothing is learned over it."""
    none = part(tls, "worker", "ca")
    for tokens in ("", "admin " + "x" * 43):
        with connecting(by_token, tls_folder(none, tokens=tokens) if tokens else none) as client:
            assert_shut_out(client, Reason.DENIED)
            with pytest.raises(CredentialsError, match="token"):
                client.stats()


def test_what_is_not_a_known_verb_is_refused_before_its_message_is_read(by_token: DaemonProcess, tls: Path) -> None:
    """A stranger's stream gets its answer although it never sends anything."""
    credentials = grpc.ssl_channel_credentials((tls / "ca.pem").read_bytes())
    with grpc.secure_channel(by_token.listen, credentials) as channel:
        for method in ("/kvstore.v1.KVStore/Upload", "/kvstore.v1.Admin/Evict", "/no.such/Thing"):
            silent = channel.stream_stream(method)(iter(lambda: __import__("time").sleep(60), None), timeout=20)
            with pytest.raises(grpc.RpcError) as caught:
                next(silent)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]


@pytest.mark.parametrize("by", ["tokens", "certificates"])
def test_prefixes_are_moved_by_admins_alone(
    by: str, by_token: DaemonProcess, by_certificate: DaemonProcess, tls: Path, tmp_path: Path
) -> None:
    """Over TCP, too: whoever imports decides what models go on from."""
    daemon = by_token if by == "tokens" else by_certificate
    names = ("ca", "tokens") if by == "tokens" else ("cert", "key", "ca")
    with connecting(daemon, part(tls, "worker", *names)) as worker, PackFile(str(GOLDEN_PACK)) as pack:
        roundtrip(worker)
        with pytest.raises(ScopeError, match="admin"):
            worker.import_pack(pack)
        with pytest.raises(ScopeError, match="admin"):
            worker.export_pack(str(tmp_path / "stolen.kvpack"), namespace_prefix=NAMESPACE.root)
        assert not list(tmp_path.iterdir())
    with connecting(daemon, part(tls, "admin", *names)) as admin, PackFile(str(GOLDEN_PACK)) as pack:
        assert admin.import_pack(pack)["blobs"] == 3
        exported = admin.export_pack(str(tmp_path / "back.kvpack"), namespace_prefix=pack.manifest.namespace.root)
        assert exported["blobs"] == 3
        admin.evict(namespace_prefix=pack.manifest.namespace.root)


def test_certificates_let_workers_in_and_admins_further(by_certificate: DaemonProcess, tls: Path) -> None:
    """By the name in the certificate."""
    with connecting(by_certificate, part(tls, "worker", "cert", "key", "ca")) as worker:
        roundtrip(worker)
        with pytest.raises(ScopeError, match="kvstore-admin"):
            worker.evict(all=True)
    with connecting(by_certificate, part(tls, "admin", "cert", "key", "ca")) as admin:
        assert admin.stats()["disk"]["blobs"] == 2


def test_an_admin_with_a_certificate_is_told_why_a_call_is_refused(by_certificate: DaemonProcess, tls: Path) -> None:
    """Here for its version."""
    names = ("ca.pem", "key.pem", "cert.pem")
    credentials = grpc.ssl_channel_credentials(*((tls / "admin" / name).read_bytes() for name in names))
    with grpc.secure_channel(by_certificate.listen, credentials) as channel:
        with pytest.raises(grpc.RpcError, match="this daemon speaks protocol") as caught:
            channel.unary_unary("/kvstore.v1.Admin/Stats")(b"", metadata=((PROTOCOL_KEY, "999"),), timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]


def test_without_a_certificate_of_the_ca_there_is_no_connection(
    by_certificate: DaemonProcess, tls: Path, tmp_path: Path
) -> None:
    """None at all, one of another CA, or plain text: unavailable, and never an exception in a worker."""
    other, ca = tmp_path / "other", (tls / "ca.pem").read_bytes()
    assert run_cli([*CERT, "--dir", str(other)], os.environ).returncode == 0
    configs = (
        {"tls_dir": str(part(tls, "worker", "ca"))},
        {"tls_dir": str(tls_folder(part(other, "worker", "cert", "key"), ca=ca))},
        {"tls_dir": str(copied(part(tls, "worker", "cert", "key"), other, "ca"))},
        {"insecure_tcp": True},
    )
    for config in configs:
        with connect(config=small_config(by_certificate.listen, **config)) as client:
            session = client.session(NAMESPACE, connect_ms=500)
            assert session.fetch(TOKENS).reason in (Reason.UNAVAILABLE, Reason.DEADLINE, Reason.TLS)


def test_a_daemon_in_the_place_of_another_is_not_talked_to(
    tmp_path_factory: pytest.TempPathFactory, tls: Path, tmp_path: Path
) -> None:
    """Its certificate is of another CA: neither prompt nor token reaches it."""
    other = tmp_path / "other"
    assert run_cli([*CERT, "--dir", str(other), "--host", "127.0.0.1"], os.environ).returncode == 0
    with (
        started(serving(tmp_path_factory, other / "daemon"), other) as impostor,
        connecting(impostor, part(tls, "worker", "ca", "tokens")) as client,
    ):
        assert client.session(NAMESPACE, connect_ms=20_000).fetch(TOKENS).reason is Reason.TLS


@pytest.mark.parametrize("name", ["key.pem", "tokens"])
def test_a_daemon_does_not_start_on_a_key_or_tokens_that_others_can_read(
    tmp_path_factory: pytest.TempPathFactory, tls: Path, name: str
) -> None:
    """And leaves no directory behind."""
    folder = copied(tmp_path_factory.mktemp("tls"), tls / "daemon", "cert", "key", "ca", "tokens")
    daemon = serving(tmp_path_factory, folder)
    (folder / name).chmod(0o640)
    ended = run_cli(["serve"], daemon.environ())
    assert ended.returncode == 1 and f"chmod 600 {folder / name}" in ended.stderr and "Traceback" not in ended.stderr
    assert not daemon.data_dir.exists()


def test_the_command_line_takes_its_keys_from_the_configuration(by_token: DaemonProcess, tls: Path) -> None:
    """As every client does."""
    environ = {**by_token.environ(), "KVSTORE_TLS_DIR": str(tls / "admin")}
    assert run_cli(["stats", "--json"], environ).returncode == 0
    refused = run_cli(["evict", "--all"], {**environ, "KVSTORE_TLS_DIR": str(tls / "worker")})
    assert refused.returncode == 1 and refused.stderr == "kvstore: this takes an admin's token\n"


def reason_of(client: Client) -> Reason:
    """How a fetch of what was stored ends."""
    return client.session(NAMESPACE, "raw", **SLOW).fetch(TOKENS).reason  # type: ignore[arg-type]


def eventually(client: Client, reason: Reason, daemon: DaemonProcess) -> None:
    """Until fetches end so."""
    wait_until(lambda: reason_of(client) is reason, 60, daemon.log_text)


@pytest.mark.parametrize("first", ["daemon", "client"])
def test_tokens_change_while_daemon_and_client_live(
    tmp_path_factory: pytest.TempPathFactory, tls: Path, tmp_path: Path, first: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In either order; the old token is refused, and each side says once that it has read its file again."""
    caplog.set_level("INFO", "kvstore.config.credentials")
    old, new = (f"worker {letter * 40}\nadmin {letter.upper() * 40}\n" for letter in "on")
    theirs = tls_folder(copied(tmp_path / "daemon", tls / "daemon", "cert", "key"), tokens=old)
    mine, others = (
        tls_folder(copied(tmp_path / name, tls / "worker", "ca"), tokens=old) for name in ("client", "late")
    )
    with (
        started(serving(tmp_path_factory, theirs), tls) as daemon,
        connecting(daemon, mine) as client,
        connecting(daemon, others) as late,
    ):
        roundtrip(client)
        roundtrip(late)
        tls_folder(theirs if first == "daemon" else mine, tokens=new)
        if first == "daemon":
            eventually(client, Reason.DENIED, daemon)
        tls_folder(mine if first == "daemon" else theirs, tokens=new)
        eventually(late, Reason.DENIED, daemon)
        eventually(client, Reason.OK, daemon)
        roundtrip(client)
        assert client.stats()["disk"]["blobs"] == 2
        assert reason_of(late) is Reason.DENIED
        assert daemon.log_text().count("tokens changed") == 1
    assert [record.message for record in caplog.records if "changed" in record.message] == [
        "tokens changed, and is in force as it is now"
    ]


@pytest.mark.parametrize("restarted", [False, True])
def test_certificates_and_their_ca_change_while_daemon_and_client_live(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, restarted: bool
) -> None:
    """Both know each other by the new CA from the next connection on, and those who have the old one only are out."""
    folder, old = tmp_path / "tls", tmp_path / "old"
    arguments = [*CERT, "--dir", str(folder), *HOSTS]
    assert run_cli(arguments, os.environ).returncode == 0
    shutil.copytree(folder, old)
    daemon = serving(tmp_path_factory, folder / "daemon")
    with (
        started(daemon, folder),
        connecting(daemon, folder / "worker") as client,
        connecting(daemon, folder / "worker") as late,  # which connects for the first time below
        connecting(daemon, old / "worker") as outsider,
    ):
        roundtrip(client)
        assert run_cli([*arguments, "--force"], os.environ).returncode == 0
        wait_until(lambda: "in force as it is now" in daemon.log_text(), 60, daemon.log_text)
        if restarted:
            assert daemon.stop() == 0, daemon.log_text()
            daemon.start(wait=False)  # whose health is asked in plain text
        eventually(late, Reason.OK, daemon)
        eventually(client, Reason.OK, daemon)
        assert not outsider.session(NAMESPACE, **SLOW).fetch(TOKENS)  # type: ignore[arg-type]
        roundtrip(client)


# Runs the real thing with loading of foreign code made fatal: unpickling anywhere, marshal anywhere but in Python's own
# import of its byte code.
POISON = """
import os, pickle, sys
def dead(*_, **__):
    os.write(2, b"POISONED: a pickle was loaded\\n"); os._exit(66)
pickle.load = pickle.loads = pickle.Unpickler = dead
def audit(event, arguments):
    if event == "pickle.find_class": dead()
    if event in ("marshal.loads", "marshal.load"):
        if "importlib" not in sys._getframe(1).f_code.co_filename: dead()
sys.addaudithook(audit)
"""


def test_no_pickle_is_ever_loaded_by_daemon_or_client(tmp_path: Path) -> None:
    """Start, store, fetch by every way, evict, check, restart: with pickle and marshal booby-trapped."""
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / "sitecustomize.py").write_text(POISON)
    path = os.pathsep.join([str(trap), os.environ.get("PYTHONPATH", str(Path(__file__).parents[2]))])
    environ = {**os.environ, "PYTHONPATH": path}
    sprung = subprocess.run([sys.executable, "-c", "import pickle; pickle.loads(b'N.')"], env=environ, check=False)
    assert sprung.returncode == 66
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        with DaemonProcess(tmp_path / "data") as daemon:
            script = f"""
from kvstore.client.client import connect
from tests.support.limits import make_config
from tests.e2e.test_access import LAYOUT, NAMESPACE, SLOW, TOKENS, roundtrip
with connect(config=make_config(listen={daemon.listen!r}, min_prefix_tokens=1)) as client:
    roundtrip(client)
    session = client.session(NAMESPACE, **SLOW)
    for way in (("packed", "stream"), ("dense", "stream"), ("packed", "path")):
        assert session.fetch(TOKENS, *way), way
    assert not client.check()["findings"]
    client.evict(bytes=1)
"""
            ran = subprocess.run(
                [sys.executable, "-c", script],
                cwd=Path(__file__).parents[2],
                capture_output=True,
                text=True,
                check=False,
            )
            assert ran.returncode == 0, ran.stderr + daemon.log_text()
            daemon.restart()
            assert daemon.stop() == 0 and "POISONED" not in daemon.log_text()
