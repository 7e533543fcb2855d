"""Certificates that are not valid now, not for this host, not of our CA, or not of this key: said so, in words."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from kvstore.cli import cert
from kvstore.cli.cert import Pair, make_ca, make_pair
from kvstore.client.client import Client
from kvstore.config import Config
from kvstore.config.credentials import CredentialFiles, load_credentials
from kvstore.core.blocks import Reason
from kvstore.errors import ConfigError, TLSError
from kvstore.server.calls.authorize import daemon_credentials
from tests.support.daemon import run_cli
from tests.support.synthetic import make_layout, make_namespace
from tests.support.tls import tls_folder

HOST = "127.0.0.1"
CA = make_ca(100)
PATIENT = {"connect_ms": 20_000, "stall_ms": 20_000}


def from_to(monkeypatch: pytest.MonkeyPatch, begin_days: int, end_days: int, host: str = HOST, ca: Pair = CA) -> Pair:
    """A server's pair that is valid from then till then."""

    def builder(subject: x509.Name, issuer: x509.Name, key: object, days: int) -> x509.CertificateBuilder:
        now, serial = datetime.datetime.now(datetime.UTC), x509.random_serial_number()
        begin, end = (now + datetime.timedelta(days=days, minutes=1) for days in (begin_days, end_days))
        return x509.CertificateBuilder(issuer, subject, key.public_key(), serial, begin, end)  # type: ignore[attr-defined]

    with monkeypatch.context() as patched:
        patched.setattr(cert, "_builder", builder)
        return make_pair(ca, "daemon", 1, (host,))


def written(folder: Path, pair: Pair, ca: Pair = CA) -> dict[str, str]:
    """A configuration of these files."""
    return {"tls_dir": str(tls_folder(folder, cert=pair.pem, key=pair.key_pem, ca=ca.pem))}


@pytest.fixture
def port_of() -> Iterator[object]:
    """Servers that do nothing but TLS."""
    servers = []

    def serve(pair: Pair) -> int:
        server = grpc.server(ThreadPoolExecutor(1))
        servers.append(server)
        port = server.add_secure_port(f"{HOST}:0", grpc.ssl_server_credentials([(pair.key_pem, pair.pem)]))
        server.start()
        return int(port)

    yield serve
    for server in servers:
        server.stop(0).wait()


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ({"begin_days": -9, "end_days": -1}, "expired"),
        ({"begin_days": 1, "end_days": 9}, "not yet valid"),
        ({"begin_days": -1, "end_days": 9, "host": "elsewhere.example"}, "Hostname"),
        ({"begin_days": -1, "end_days": 9, "ca": make_ca(9)}, "issuer"),
    ],
)
def test_trouble_with_tls_has_a_reason_and_words_of_its_own(
    pair: dict[str, object],
    words: str,
    port_of: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In misses, in what admin verbs raise, and once in the log."""
    port = port_of(from_to(monkeypatch, **pair))  # type: ignore[operator, arg-type]
    with Client(Config(listen=f"{HOST}:{port}", tls_dir=str(tls_folder(tmp_path, ca=CA.pem)))) as client:
        session = client.session(make_namespace(make_layout()), **PATIENT)
        for _ in range(5):
            answer = session.fetch(list(range(100)))
            assert (answer.reason, words in answer.detail) == (Reason.TLS, True), answer  # type: ignore[union-attr]
        with pytest.raises(TLSError, match=words):
            client.stats()
    assert [record.levelname for record in caplog.records if words in record.message].count("WARNING") == 1


def test_files_that_are_not_a_pair_are_errors_of_the_configuration(tmp_path: Path) -> None:
    """They name the file; a daemon does not start with them, and `connect` raises."""
    pair = make_pair(CA, "daemon", 9, (HOST,))
    files = written(tmp_path, Pair(pair.certificate, make_pair(CA, "other", 9, (HOST,)).key))
    with pytest.raises(ConfigError, match=r"tls_dir: .*key\.pem is not the key"):
        load_credentials(Config(listen=f"{HOST}:1", **files))
    files = written(tmp_path, pair)
    for name in ("cert.pem", "key.pem", "ca.pem"):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"-----BEGIN NOTHING-----\n")
        with pytest.raises(ConfigError, match=f"tls_dir: {tmp_path}/{name}"):
            Client(Config(listen=f"{HOST}:1", **files))
        (tmp_path / name).write_bytes(before)
    load_credentials(Config(listen=f"{HOST}:1", **files))


def test_the_end_of_a_certificate_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A month ahead as a warning; after it a daemon does not start, and before it neither."""
    config = Config(listen=f"{HOST}:1", **written(tmp_path, from_to(monkeypatch, -1, 20)))
    with caplog.at_level(logging.WARNING):
        daemon_credentials(config)
    assert "expires in 20 days" in caplog.text
    for days, words in (((-9, -1), "has expired"), ((1, 9), "is not valid before")):
        written(tmp_path, from_to(monkeypatch, *days))
        with pytest.raises(ConfigError, match=words):
            daemon_credentials(config)
        load_credentials(config)  # a client goes on, without the store


def test_the_end_of_a_certificate_is_announced_daily(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not only at start, which may be long ago; a new certificate ends it."""
    config = Config(listen=f"{HOST}:1", **written(tmp_path, from_to(monkeypatch, -1, 20)))
    now = [datetime.datetime.now(datetime.UTC)]
    files = CredentialFiles(config, daemon_credentials, lambda: now[0])
    for hours, lines in ((0, 1), (23, 1), (2, 2), (1, 2), (24, 3)):
        now[0] += datetime.timedelta(hours=hours)
        for _ in range(3):
            files.tell_end()
        assert caplog.text.count("expires in") == lines
    written(tmp_path, from_to(monkeypatch, -1, 300))
    assert files.renew()
    now[0] += datetime.timedelta(hours=25)
    files.tell_end()
    assert caplog.text.count("expires in") == 3


def test_a_client_announces_the_end_of_its_certificate_daily(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With whatever it asks of the daemon next; nothing runs for it."""
    with Client(Config(listen=f"{HOST}:1", **written(tmp_path, from_to(monkeypatch, -1, 20)))) as client:
        session = client.session(make_namespace(make_layout()))
        files = client._connection._files
        for lines in (2, 3):
            files._told -= datetime.timedelta(days=1, seconds=1)
            for _ in range(3):
                session.fetch(list(range(100)))
            assert caplog.text.count("expires in") == lines


def test_check_never_takes_the_local_directory_for_a_daemon_elsewhere(tmp_path: Path) -> None:
    """Exit status 3, as of a daemon that cannot be reached."""
    environ = {"PATH": "", "HOME": str(tmp_path), "KVSTORE_LISTEN": f"{HOST}:1", "KVSTORE_INSECURE_TCP": "true"}
    run = run_cli(["check"], {**environ, "KVSTORE_DATA_DIR": str(tmp_path / "data")})
    assert (run.returncode, "offline" in run.stderr) == (3, False), run.stderr
