"""TCP with TLS: who gets in with what, and what the others see."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstore.client.client import Client, connect
from kvstore.config import Config
from kvstore.core.blocks import Reason
from kvstore.errors import CredentialsError, ScopeError, UnavailableError
from tests.support.daemon import OPEN_DEADLINES, DaemonProcess, run_cli
from tests.support.servers import free_port, wait_until
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=1, width=64)
NAMESPACE = make_namespace(LAYOUT)
TOKENS = list(range(300))
SLOW = {"connect_ms": 5000, "stall_ms": 20_000, "total_ms": 20_000}


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `kvstore cert` makes, under a umask that hides nothing."""
    directory = tmp_path_factory.mktemp("access") / "tls"
    before = os.umask(0)
    try:
        made = run_cli(["cert", "--dir", str(directory), "--host", "localhost", "--host", "127.0.0.1"], os.environ)
    finally:
        os.umask(before)
    assert made.returncode == 0, made.stderr
    for line, scope in zip((directory / "tokens").read_text().splitlines(), ("worker", "admin"), strict=True):
        path = directory / f"{scope}.token"
        path.touch(mode=0o600)
        path.write_text(line)
    return directory


def serving(tmp_path_factory: pytest.TempPathFactory, tls: Path, **config: Any) -> DaemonProcess:
    """A daemon on TCP with its certificate; not started."""
    address = f"127.0.0.1:{free_port()}"
    pair = {"tls_cert": tls / "server.pem", "tls_key": tls / "server.key"}
    return DaemonProcess(
        tmp_path_factory.mktemp("daemon") / "data", listen=address, **{"insecure_tcp": "false", **pair, **config}
    )


@contextmanager
def started(daemon: DaemonProcess, tls: Path) -> Iterator[DaemonProcess]:
    """Running and serving: health takes TLS but no token."""
    try:
        daemon.start(wait=False)
        with connecting(daemon, tls, **as_worker(tls)) as client:
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


def as_worker(tls: Path) -> dict[str, Any]:
    """A worker's certificate."""
    return {"tls_cert": str(tls / "worker.pem"), "tls_key": str(tls / "worker.key")}


def connecting(daemon: DaemonProcess, tls: Path, **config: Any) -> Client:
    """A client that trusts the CA, with what else is given."""
    return connect(
        config=Config(
            listen=daemon.listen, min_prefix_tokens=1, **{**OPEN_DEADLINES, "tls_ca": str(tls / "ca.pem"), **config}
        )
    )


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
    with started(serving(tmp_path_factory, tls, token_file=tls / "tokens"), tls) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def by_certificate(tmp_path_factory: pytest.TempPathFactory, tls: Path) -> Iterator[DaemonProcess]:
    """A daemon that asks for certificates."""
    with started(serving(tmp_path_factory, tls, tls_ca=tls / "ca.pem"), tls) as daemon:
        yield daemon


def test_everything_that_cert_makes_is_closed_to_others(tls: Path) -> None:
    """The umask was 0."""
    assert tls.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in tls.iterdir() if path.stat().st_mode & 0o077} == {}


def test_cert_replaces_nothing_unless_told_to(tls: Path, tmp_path: Path) -> None:
    """Not even when only one of the files is there."""
    (tmp_path / "tls").mkdir(mode=0o700)
    (tmp_path / "tls" / "tokens").write_text("mine")
    arguments = ["cert", "--dir", str(tmp_path / "tls")]
    refused = run_cli(arguments, os.environ)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1) and "has tokens already" in refused.stderr
    assert [path.name for path in (tmp_path / "tls").iterdir()] == ["tokens"]
    assert run_cli([*arguments, "--force"], os.environ).returncode == 0
    assert (tmp_path / "tls" / "tokens").read_text() != "mine"
    (tmp_path / "tls").chmod(0o755)
    refused = run_cli([*arguments, "--force"], os.environ)
    assert refused.returncode == 1 and "chmod 700" in refused.stderr
    assert run_cli([*arguments, "--host", "no host"], os.environ).returncode == 2


def test_a_worker_token_stores_and_fetches_and_an_admin_token_does_all(by_token: DaemonProcess, tls: Path) -> None:
    """Admin verbs are a scope of their own."""
    with connecting(by_token, tls, token_file=str(tls / "worker.token")) as worker:
        roundtrip(worker)
        for verb in (worker.stats, worker.list, worker.check, lambda: worker.evict(all=True)):
            with pytest.raises(ScopeError, match="admin"):
                verb()
    with connecting(by_token, tls, token_file=str(tls / "admin.token")) as admin:
        roundtrip(admin)
        assert admin.stats()["disk"]["blobs"] == 2
    with connecting(by_token, tls, token_file=str(tls / "tokens")) as both:
        assert both.list()["namespaces"]


def test_without_a_known_token_there_are_misses_and_no_answers(by_token: DaemonProcess, tls: Path) -> None:
    """The connection is made, nothing is learned over it."""
    (tls / "wrong.token").touch(mode=0o600)
    (tls / "wrong.token").write_text("admin " + "x" * 43)
    for wrong in ({}, {"token_file": str(tls / "wrong.token")}):
        with connecting(by_token, tls, **wrong) as client:
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


def test_certificates_let_workers_in_and_admins_further(by_certificate: DaemonProcess, tls: Path) -> None:
    """By the name in the certificate."""
    with connecting(by_certificate, tls, **as_worker(tls)) as worker:
        roundtrip(worker)
        with pytest.raises(ScopeError, match="kvstore-admin"):
            worker.evict(all=True)
    pair = {"tls_cert": str(tls / "admin.pem"), "tls_key": str(tls / "admin.key")}
    with connecting(by_certificate, tls, **pair) as admin:
        assert admin.stats()["disk"]["blobs"] == 2


def test_without_a_certificate_of_the_ca_there_is_no_connection(
    by_certificate: DaemonProcess, tls: Path, tmp_path: Path
) -> None:
    """None at all, one of another CA, or plain text: unavailable, and never an exception in a worker."""
    assert run_cli(["cert", "--dir", str(tmp_path / "other")], os.environ).returncode == 0
    others = as_worker(tmp_path / "other")
    for config in ({}, others, {"tls_ca": "", "insecure_tcp": True}, {**as_worker(tls), "tls_ca": others["tls_cert"]}):
        with connecting(by_certificate, tls, **config) as client:
            session = client.session(NAMESPACE, connect_ms=500)
            assert session.fetch(TOKENS).reason in (Reason.UNAVAILABLE, Reason.DEADLINE, Reason.TLS)


def test_a_daemon_in_the_place_of_another_is_not_talked_to(
    tmp_path_factory: pytest.TempPathFactory, tls: Path, tmp_path: Path
) -> None:
    """Its certificate is of another CA: neither prompt nor token reaches it."""
    assert run_cli(["cert", "--dir", str(tmp_path / "other"), "--host", "127.0.0.1"], os.environ).returncode == 0
    other = tmp_path / "other"
    with (
        started(serving(tmp_path_factory, other, token_file=other / "tokens"), other) as impostor,
        connecting(impostor, tls, token_file=str(tls / "worker.token")) as client,
    ):
        assert client.session(NAMESPACE, connect_ms=20_000).fetch(TOKENS).reason is Reason.TLS


@pytest.mark.parametrize("name", ["server.key", "tokens"])
def test_a_daemon_does_not_start_on_a_key_or_tokens_that_others_can_read(
    tmp_path_factory: pytest.TempPathFactory, tls: Path, name: str
) -> None:
    """And leaves no directory behind."""
    daemon = serving(tmp_path_factory, tls, token_file=tls / "tokens")
    (tls / name).chmod(0o640)
    try:
        ended = run_cli(["serve"], daemon.environ())
    finally:
        (tls / name).chmod(0o600)
    assert ended.returncode == 1 and f"chmod 600 {tls / name}" in ended.stderr and "Traceback" not in ended.stderr
    assert not daemon.data_dir.exists()


def test_the_command_line_takes_its_keys_from_the_configuration(by_token: DaemonProcess, tls: Path) -> None:
    """As every client does."""
    environ = {**by_token.environ(), "KVSTORE_TLS_CA": str(tls / "ca.pem")}
    for key in ("TLS_CERT", "TLS_KEY"):
        del environ[f"KVSTORE_{key}"]
    assert run_cli(["stats", "--json"], environ).returncode == 0
    refused = run_cli(["evict", "--all"], {**environ, "KVSTORE_TOKEN_FILE": str(tls / "worker.token")})
    assert refused.returncode == 1 and refused.stderr == "kvstore: this takes an admin's token\n"


def replace(path: Path, text: str) -> None:
    """New content under an old name, at once, as tools that rotate secrets write."""
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_text(text)
    new.rename(path)


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
    theirs, mine = tmp_path / "daemon.tokens", tmp_path / "client.tokens"
    old, new = (f"worker {letter * 40}\nadmin {letter.upper() * 40}\n" for letter in "on")
    for path in (theirs, mine, tmp_path / "old.tokens"):
        replace(path, old)
    with (
        started(serving(tmp_path_factory, tls, token_file=theirs), tls) as daemon,
        connecting(daemon, tls, token_file=str(mine)) as client,
        connecting(daemon, tls, token_file=str(tmp_path / "old.tokens")) as late,
    ):
        roundtrip(client)
        roundtrip(late)
        replace(theirs if first == "daemon" else mine, new)
        if first == "daemon":
            eventually(client, Reason.DENIED, daemon)
        replace(mine if first == "daemon" else theirs, new)
        eventually(late, Reason.DENIED, daemon)
        eventually(client, Reason.OK, daemon)
        roundtrip(client)
        assert client.stats()["disk"]["blobs"] == 2
        assert reason_of(late) is Reason.DENIED
        assert daemon.log_text().count("token_file changed") == 1
    assert [record.message for record in caplog.records if "changed" in record.message] == [
        "token_file changed, and is in force as it is now"
    ]


@pytest.mark.parametrize("restarted", [False, True])
def test_certificates_and_their_ca_change_while_daemon_and_client_live(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, restarted: bool
) -> None:
    """Both know each other by the new CA from the next connection on, and those who have the old one only are out."""
    folder, old = tmp_path / "tls", tmp_path / "old"
    arguments = ["cert", "--dir", str(folder), "--host", "localhost", "--host", "127.0.0.1"]
    assert run_cli(arguments, os.environ).returncode == 0
    shutil.copytree(folder, old)
    daemon = serving(tmp_path_factory, folder, tls_ca=folder / "ca.pem")
    with (
        started(daemon, folder),
        connecting(daemon, folder, **as_worker(folder)) as client,
        connecting(daemon, folder, **as_worker(folder)) as late,  # which connects for the first time below
        connecting(daemon, old, **as_worker(old)) as outsider,
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
