"""Keys, tokens and scopes: what is read, what is refused, and what neither is ever said aloud."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import grpc
import pytest

from kvstore.cli import cert
from kvstore.client.results import reason_of
from kvstore.config import Config
from kvstore.config.credentials import (
    ADMIN_NAME,
    BEARER,
    METADATA_KEY,
    CredentialFiles,
    Scope,
    Token,
    load_credentials,
    parse_tokens,
    scope_of_token,
    token_to_present,
)
from kvstore.config.private_files import SECRET_BYTES_MAX, read_private, write_private
from kvstore.core.blocks import Reason
from kvstore.errors import ConfigError, CredentialsError, DirectoryError, ScopeError
from kvstore.server.calls.authorize import bearer, daemon_credentials, scope_of_method
from kvstore.wire.status import to_status
from tests.support.tls import tls_folder

W, A = "w" * 32, "a" * 32
TOKENS = (Token(Scope.WORKER, W), Token(Scope.ADMIN, A))


def secret_file(tmp_path: Path, data: bytes = b"admin " + A.encode()) -> Path:
    """A 0600 file."""
    path = tmp_path / "secret"
    write_private(path, data)
    return path


def test_a_private_file_is_made_0600_under_any_umask_and_never_over_another(tmp_path: Path) -> None:
    """Also not through a symlink that somebody left there."""
    before = os.umask(0)
    try:
        path = secret_file(tmp_path, b"x")
    finally:
        os.umask(before)
    assert (path.stat().st_mode & 0o777, read_private(path)) == (0o600, b"x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for taken in (path, tmp_path / "link"):
        with pytest.raises(DirectoryError, match="File exists"):
            write_private(taken, b"y")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666, 0o601])
def test_a_secret_that_others_can_reach_is_refused_with_the_fix(tmp_path: Path, mode: int) -> None:
    """Doing what the message says is enough."""
    path = secret_file(tmp_path)
    path.chmod(mode)
    with pytest.raises(DirectoryError, match=f"open to other users; run: chmod 600 {path}"):
        read_private(path)
    subprocess.run(["chmod", "600", str(path)], check=True)
    assert read_private(path)


def test_a_secret_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They could change it, and would know it."""
    path = secret_file(tmp_path)
    uid = os.geteuid()
    monkeypatch.setattr("kvstore.config.private_files.os.geteuid", lambda: uid + 1)
    with pytest.raises(DirectoryError, match=f"belongs to user id {uid}"):
        read_private(path)


def test_what_is_no_secret_is_refused_at_once(tmp_path: Path) -> None:
    """A FIFO would hang, a device never ends."""
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "directory").mkdir()
    with (tmp_path / "large").open("wb") as file:
        file.truncate(SECRET_BYTES_MAX + 1)
    (tmp_path / "large").chmod(0o600)
    for name in ("fifo", "directory", "large", "missing"):
        with pytest.raises(DirectoryError):
            read_private(tmp_path / name)


def test_a_token_file_has_comments_and_lines_of_scope_and_token() -> None:
    """Empty lines and comments do not count."""
    text = f"# ours\n\nworker {W}\n  admin   {A}  # for people\n"
    assert parse_tokens(text.encode(), "f") == TOKENS


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"root {W}", "line 1: write `worker TOKEN`"),
        (W, "line 1: write"),
        (f"admin {W} {W}", "line 1: write"),
        ("admin short", "at least 32"),
        (f"admin {'é' * 40}", "ASCII"),
        (f"admin {'a' * 40}\x01", "ASCII"),
        ("# nothing", "has no token"),
        ("", "has no token"),
    ],
)
def test_a_wrong_token_file_names_the_line_and_never_the_token(line: str, words: str) -> None:
    """The message ends up in logs."""
    with pytest.raises(ConfigError, match=words) as caught:
        parse_tokens(line.encode(), "f")
    assert not any(word in str(caught.value) for word in line.split() if len(word) > 6 and word.isalnum())


def test_tokens_and_credentials_do_not_show_when_printed(tmp_path: Path) -> None:
    """Whatever prints them, a log or a traceback."""
    folder = tls_folder(tmp_path / "tls", ca=cert.make_ca(9).pem, tokens=f"admin {A}")
    config = Config(listen="h:1", tls_dir=str(folder))
    assert A not in repr(TOKENS) + repr(load_credentials(config))


def test_only_a_whole_token_gives_its_scope() -> None:
    """Nothing short of it, nothing around it."""
    assert scope_of_token(W, TOKENS) is Scope.WORKER
    assert scope_of_token(A, TOKENS) is Scope.ADMIN
    for wrong in ("", W[:-1], W + "w", W.upper(), f" {W}", "\udcff", "é" * 32):
        assert scope_of_token(wrong, TOKENS) is Scope.NOTHING
    assert scope_of_token(W, (Token(Scope.ADMIN, W), Token(Scope.WORKER, W))) is Scope.ADMIN
    assert scope_of_token("", ()) is Scope.NOTHING


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token, whether or not one was found, by digests of one length."""
    seen: list[tuple[int, int]] = []
    compare = cert.secrets.compare_digest

    def spy(a: bytes, b: bytes) -> bool:
        seen.append((len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr("kvstore.config.credentials.hmac.compare_digest", spy)
    for presented in (W, A, "", "x" * 1000):
        scope_of_token(presented, TOKENS)
    assert seen == [(32, 32)] * 8


def test_a_client_presents_the_least_that_is_enough() -> None:
    """A worker's process does not show an admin's token to every call."""
    assert token_to_present(TOKENS, Scope.WORKER) == W
    assert token_to_present(TOKENS, Scope.ADMIN) == A
    assert token_to_present(TOKENS[:1], Scope.ADMIN) == W
    assert token_to_present(TOKENS[1:], Scope.WORKER) == A
    assert token_to_present((), Scope.ADMIN) == ""


def test_a_token_comes_as_one_bearer_and_not_otherwise() -> None:
    """Two of them, or another scheme, are none."""
    assert bearer([("x", "y"), (METADATA_KEY, BEARER + W)]) == W
    for metadata in (None, [], [(METADATA_KEY, W)], [(METADATA_KEY, f"Basic {W}")], [(METADATA_KEY, BEARER + W)] * 2):
        assert bearer(metadata) == ""


def test_what_is_not_named_takes_an_admin() -> None:
    """A verb that is added later is closed until somebody opens it."""
    assert scope_of_method("/kvstore.v1.KVStore/Fetch") is Scope.WORKER
    assert scope_of_method("/grpc.health.v1.Health/Check") is Scope.NOTHING
    assert scope_of_method("/grpc.health.v1.Health/Watch") is Scope.WORKER
    for method in ("/kvstore.v1.Admin/Stats", "/kvstore.v1.Admin/Evict", "/kvstore.v1.KVStoreX/Fetch", "", "/"):
        assert scope_of_method(method) is Scope.ADMIN


def test_refusals_have_a_status_and_a_reason_of_their_own() -> None:
    """One table each way; a worker sees a miss."""
    assert to_status(CredentialsError("")) is grpc.StatusCode.UNAUTHENTICATED
    assert to_status(ScopeError("")) is grpc.StatusCode.PERMISSION_DENIED
    assert reason_of(CredentialsError("")) is reason_of(ScopeError("")) is Reason.DENIED


def test_a_daemon_on_tcp_must_know_itself_and_who_connects(tmp_path: Path) -> None:
    """Unless the switch says that it need not; on a unix socket the files are not even read."""
    ca = cert.make_ca(9)
    made = cert.make_pair(ca, "daemon", 9, ("h",))
    tls_folder(tmp_path, ca=ca.pem)
    config = Config(listen="h:1", tls_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"has no cert\.pem .*`kvstore config cert`"):
        daemon_credentials(config)
    tls_folder(tmp_path, cert=made.pem, key=made.key_pem)
    assert daemon_credentials(config).ca
    (tmp_path / "ca.pem").unlink()
    with pytest.raises(ConfigError, match="must know who connects"):
        daemon_credentials(config)
    tls_folder(tmp_path, tokens=f"admin {A}")
    assert daemon_credentials(config).tokens
    assert daemon_credentials(Config(listen="h:1", insecure_tcp=True)).chain == b""
    assert daemon_credentials(Config(tls_dir="/nowhere")).tokens == ()


def test_a_folder_that_is_not_what_cert_makes_is_an_error(tmp_path: Path) -> None:
    """Missing, empty, or with half of a pair."""
    config = Config(listen="h:1", tls_dir=str(tmp_path / "tls"))
    with pytest.raises(ConfigError, match=f"tls_dir: cannot read {tmp_path}/tls: No such file"):
        load_credentials(config)
    tls_folder(tmp_path / "tls", other=b"x")
    with pytest.raises(ConfigError, match=r"has none of cert\.pem, .*, tokens; `kvstore config cert`"):
        load_credentials(config)
    for one, other in (("cert", "key"), ("key", "cert")):
        folder = tls_folder(tmp_path / one, **{one: b"x"})
        with pytest.raises(ConfigError, match=f"{folder} has {one}.pem and no {other}.pem"):
            load_credentials(Config(listen="h:1", tls_dir=str(folder)))


def test_every_folder_that_cert_makes_is_a_tls_dir(tmp_path: Path) -> None:
    """With the tokens that its end needs; the key that signs is in none of them."""
    cert.write_files(tmp_path, cert.make_files(("h",), 9), force=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["admin", "ca.key", "ca.pem", "daemon", "worker"]
    scopes = {}
    for end in ("daemon", "worker", "admin"):
        load = daemon_credentials if end == "daemon" else load_credentials
        read = load(Config(listen="h:1", tls_dir=str(tmp_path / end)))
        assert read.chain and read.key and read.ca == (tmp_path / "ca.pem").read_bytes()
        scopes[end] = [token.scope for token in read.tokens]
    assert scopes == {"daemon": [Scope.WORKER, Scope.ADMIN], "worker": [Scope.WORKER], "admin": [Scope.ADMIN]}


def test_cert_signs_what_each_end_is_for_and_nothing_else() -> None:
    """P-256, the CA signs no further CAs, a client's certificate is no server's."""
    x509, ca = cert.x509, cert.make_ca(days=30)
    server = cert.make_pair(ca, "kvstore-daemon", 30, ("mac.local", "10.0.0.7")).certificate
    admin = cert.make_pair(ca, ADMIN_NAME, 30).certificate
    for certificate in (ca.certificate, server, admin):
        certificate.verify_directly_issued_by(ca.certificate)
        assert certificate.public_key().curve.name == "secp256r1"
        assert 30 <= (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days <= 31
    assert ca.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["mac.local"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    purposes = [c.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value for c in (server, admin)]
    assert [purpose._name for (purpose,) in purposes] == ["serverAuth", "clientAuth"]


def test_a_changed_file_that_cannot_be_used_leaves_the_last_one_in_force(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once if it stays so, not while it is being written; each change that holds is one line."""
    caplog.set_level("INFO", "kvstore.config.credentials")
    path = tls_folder(tmp_path / "tls", tokens=f"admin {A}") / "tokens"
    files = CredentialFiles(Config(listen="h:1", insecure_tcp=True, tls_dir=str(path.parent)))
    assert not files.renew() and not caplog.records
    path.write_bytes(b"worker ")
    assert not files.renew() and not caplog.records
    path.write_bytes(b"worker " + W.encode())
    assert files.renew() and [token.secret for token in files.current.tokens] == [W]
    path.write_bytes(b"worker " + A.encode())
    path.chmod(0o644)
    for _ in range(5):
        assert not files.renew() and [token.secret for token in files.current.tokens] == [W]
    path.unlink()
    for _ in range(5):
        assert not files.renew() and [token.secret for token in files.current.tokens] == [W]
    write_private(path, b"worker " + W.encode())
    assert not files.renew(), "what it says has not changed"
    tls_folder(path.parent, ca=cert.make_ca(9).pem)
    assert not files.renew() and files.current.ca == b"", "what was not there at the start is not used"
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in said] == ["INFO", "WARNING", "WARNING"]
    assert "chmod 600" in said[1][1] and "No such file" in said[2][1] and W not in str(said) and A not in str(said)
