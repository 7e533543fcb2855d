"""Tenants: a salt keeps them apart, encryption off the disk, and nothing that the daemon says tells of them."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.client.client import Client
from kvstore.client.results import Hit
from kvstore.client.session import Session
from kvstore.core.blocks import Reason, pack_tokens
from tests.support.child import STOP_TIMEOUT_S
from tests.support.daemon import DaemonProcess, run_cli
from tests.support.files import files_below
from tests.support.sessions import client_of, patient
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace

LAYOUT = make_layout()
SALT = b"\xa5canary-salt\x5a" * 2
TENANT = make_namespace(LAYOUT, "model", salt=SALT)
STRANGER = make_namespace(LAYOUT, "model", salt=b"another tenant")
# Ids that occur nowhere by chance, in decimal, hexadecimal or packed.
CANARY = [0x5EC2E700 + 7919 * number for number in range(600)]
PROMPT = [*CANARY, 1]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """A master key, as docs/security.md makes one."""
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text("7b" * 32 + "\n")
    return path


@pytest.fixture
def daemon(tmp_path: Path, key_file: Path) -> Iterator[DaemonProcess]:
    """A daemon that encrypts tenants."""
    config = {"encrypt": "tenants", "encryption_key": key_file, "log_level": "debug", "profile": "raw"}
    with DaemonProcess(tmp_path / "data", **config) as running:
        yield running


def fill(client: Client) -> None:
    """Store the canary for the tenant."""
    stored = patient(client, TENANT).store(CANARY, make_layers(LAYOUT, CANARY), wait=True)
    assert stored.stored_tokens == len(CANARY)


def canaries() -> list[bytes]:
    """What must not be found: tokens packed and written out, and the salt."""
    ids = [CANARY[at] for at in (0, 1, 255, 256, 400, 599)]
    texts = [str(token).encode() for token in ids] + [f"{token:x}".encode() for token in ids]
    return [*texts, *(pack_tokens([token]) for token in ids), SALT, SALT.hex().encode()]


def test_nothing_that_the_daemon_writes_or_says_holds_tokens_or_salt_of_an_encrypted_tenant(
    daemon: DaemonProcess, key_file: Path
) -> None:
    """Data directory, log at its most talkative, stats, lists, errors; after a kill in the middle of it too."""
    with client_of(daemon) as client:
        fill(client)
        hit = patient(client, TENANT).fetch(PROMPT)
        assert isinstance(hit, Hit)
        assert (hit.n_tokens, hit.source.transport) == (600, "stream")
        assert_rows(hit.layers, LAYOUT, CANARY)
        patient(client, TENANT).fetch([CANARY[0], *CANARY])
        said = json.dumps([client.stats(), client.list(), client.list(TENANT.root[:4])]).encode()
        bad = patient(client, TENANT).store(CANARY[:8], make_layers(LAYOUT, CANARY)[:1], wait=True)
        said += str(bad).encode()
    for verb in (["stats"], ["ls"], ["ls", TENANT.root.hex()[:8]], ["check"]):
        done = run_cli(verb, daemon.environ())
        said += done.stdout.encode() + done.stderr.encode()
    daemon.kill()
    written = b"".join(daemon.contents().values()) + daemon.log_text().encode()
    for canary in canaries():
        assert canary not in written
        assert canary not in said
    assert key_file.read_bytes().strip() not in written


def test_the_log_and_what_is_said_hold_no_tokens_of_a_plain_namespace_either(tmp_path: Path) -> None:
    """Only blobs and index rows do, and there the search finds them."""
    plain = make_namespace(LAYOUT, "plain")
    with DaemonProcess(tmp_path / "data", log_level="debug") as daemon, client_of(daemon) as client:
        patient(client, plain).store(CANARY, make_layers(LAYOUT, CANARY), wait=True)
        patient(client, plain).fetch(PROMPT)
        said = json.dumps([client.stats(), client.list(), client.list(plain.root[:4])]) + daemon.log_text()
        written = b"".join(daemon.contents().values())
    assert not any(canary in said.encode() for canary in canaries())
    assert pack_tokens(CANARY[:2]) in written


def test_a_restart_reads_what_was_encrypted_and_another_key_is_refused(daemon: DaemonProcess, key_file: Path) -> None:
    """The start names the setting; nothing is changed by the attempt."""
    with client_of(daemon) as client:
        fill(client)
    assert daemon.stop() == 0
    key_file.write_text("11" * 32)
    daemon.start(wait=False)
    assert daemon.process is not None
    assert daemon.process.wait(STOP_TIMEOUT_S) == 1
    assert "encryption key" in daemon.log_text()
    key_file.write_text("7b" * 32)
    daemon.start()
    with client_of(daemon) as client:
        hit = patient(client, TENANT).fetch(PROMPT)
        assert hit.n_tokens == 600
        assert next(row["encrypted"] for row in client.stats()["namespaces"])


def test_shredding_makes_a_copy_of_the_directory_worthless(daemon: DaemonProcess, tmp_path: Path) -> None:
    """`kvstore evict --shred`: the key goes first, then the blocks; a store begins with a new key."""
    with client_of(daemon) as client:
        fill(client)
        blobs = {path.name: path.read_bytes() for path in daemon.blobs()}
        done = run_cli(["evict", "--shred", "--namespace", TENANT.root.hex()[:12], "--json"], daemon.environ())
        assert json.loads(done.stdout)["blocks"] == 3, done.stderr
        assert patient(client, TENANT).fetch(PROMPT).n_tokens == 0
        assert daemon.blobs() == [] and not files_below(daemon.keys_dir, ".json")
        fill(client)
        assert patient(client, TENANT).fetch(PROMPT).n_tokens == 600
        for path in daemon.blobs():  # the copy comes back, in the place of the new blobs
            old = next(data for name, data in blobs.items() if name.split("-")[0] == path.name.split("-")[0])
            path.write_bytes(old)
        assert not patient(client, TENANT).fetch(PROMPT)
    assert run_cli(["evict", "--shred", "--all"], daemon.environ()).returncode == 2


def test_shredding_a_plain_namespace_is_a_usage_error_that_removes_nothing(tmp_path: Path) -> None:
    """It has no key to drop: exit 2 with the reason, and the blocks are served as before. A dry run says so too."""
    plain = make_namespace(LAYOUT, "plain")
    with DaemonProcess(tmp_path / "data", profile="raw") as daemon, client_of(daemon) as client:
        assert patient(client, plain).store(CANARY, make_layers(LAYOUT, CANARY), wait=True).durable
        blobs = daemon.blobs()
        for extra in ([], ["--dry-run"]):
            ended = run_cli(["evict", "--shred", "--namespace", plain.root.hex()[:12], *extra], daemon.environ())
            assert (ended.returncode, ended.stdout) == (2, "")
            assert "not encrypted" in ended.stderr and "Traceback" not in ended.stderr
        assert daemon.blobs() == blobs and len(blobs) == 3
        assert patient(client, plain).fetch(PROMPT).n_tokens == 600


@pytest.mark.parametrize("encrypt", ["off", "tenants"])
def test_a_tenant_is_served_by_stream_only(tmp_path: Path, key_file: Path, encrypt: str) -> None:
    """On the same host too: a path would tell it where others' files are."""
    process = DaemonProcess(tmp_path / "data", encrypt=encrypt, encryption_key=key_file, profile="raw")
    with process as daemon, client_of(daemon) as client:
        fill(client)
        for transport in ("auto", "path", "stream"):
            hit = patient(client, TENANT).fetch(PROMPT, "packed", transport)  # type: ignore[arg-type]
            assert isinstance(hit, Hit)
            assert (hit.n_tokens, hit.source.transport) == (600, "stream")
            assert_rows(hit.layers, LAYOUT, CANARY)


def test_a_foreign_tenants_hit_is_a_miss_like_any_other(daemon: DaemonProcess) -> None:
    """Same reason and same reply for what another tenant holds and for what nobody holds, and as fast."""
    never = [token + 5 for token in CANARY]
    with client_of(daemon) as client:
        fill(client)
        mine = [7, 8, 9] * 40
        own = patient(client, STRANGER)
        for session in (patient(client, make_namespace(LAYOUT, "model", salt=b"nobody")), own):
            held, unknown = session.fetch(PROMPT), session.fetch([*never, 1])
            assert (held.reason, held.n_tokens) == (unknown.reason, unknown.n_tokens)
            assert held.n_tokens == 0
            stored = session.store(mine, make_layers(LAYOUT, mine), wait=True)
            assert stored.reason is Reason.OK
            assert session.fetch(PROMPT) == session.fetch([*never, 1])
        # Both walk one lookup and no further. A hit's walk takes three lookups and more. What else the machine does may
        # fall on one of them, but not every time.
        assert any(ratio(own, PROMPT, [*never, 1]) < 1.5 for _ in range(6))


def ratio(session: Session, one: list[int], other: list[int]) -> float:
    """Of what asking for them takes. The fastest tenth of each: other work on the machine only ever adds."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(400):
        which = round_ % 2
        started = time.perf_counter()
        session.match(other if which else one)
        times[which].append(time.perf_counter() - started)
    fast = [statistics.quantiles(taken, n=10)[0] for taken in times]
    return max(fast) / min(fast)
