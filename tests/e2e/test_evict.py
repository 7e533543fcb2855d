"""`kvstore evict`: what it reports is what the disk gives back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.client.client import Client, connect
from kvstore.core.blocks import Reason
from tests.support.daemon import SERVE, DaemonProcess, run_here
from tests.support.files import taken_bytes
from tests.support.limits import small_config
from tests.support.synthetic import assert_rows, make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=2, width=64)
OLD, NEW = make_namespace(LAYOUT, "old"), make_namespace(LAYOUT, "new")
TOKENS = list(range(700))  # two full blocks and a tail
BRANCH = [*TOKENS[:256], *range(9000, 9300)]  # shares the first block
SLOW = {"connect_ms": 30_000, "stall_ms": 30_000, "total_ms": 60_000}
PAGE = 4096
# A daemon whose wall clock is ahead by the seconds that a file says.
AHEAD = """
import pathlib, time
plain, ahead = time.time, pathlib.Path({path!r})
time.time = lambda: plain() + float(ahead.read_text())
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon for all."""
    folder = tmp_path_factory.mktemp("daemon")
    (folder / "ahead").write_text("0")
    program = AHEAD.format(path=str(folder / "ahead")) + SERVE
    with DaemonProcess(folder / "data", program=program, profile="raw") as daemon:
        yield daemon


@pytest.fixture
def daemon(running: DaemonProcess) -> DaemonProcess:
    """With five blocks of OLD and three of NEW, used in this order."""
    with client_of(running) as client:
        client.evict(all=True)
        for namespace, tokens in ((OLD, TOKENS), (OLD, BRANCH), (NEW, TOKENS)):
            assert client.session(namespace, **SLOW).store(tokens, make_layers(LAYOUT, tokens), wait=True).durable
    assert len(running.blobs()) == 8
    return running


def client_of(daemon: DaemonProcess) -> Client:
    """A client of this daemon."""
    return connect(config=small_config(daemon.listen))


def evict(daemon: DaemonProcess, *arguments: str) -> dict[str, Any]:
    """What the command line reports."""
    ended = run_here(["evict", "--json", *arguments], daemon.environ())
    assert ended.returncode == 0, ended.stderr
    report: dict[str, Any] = json.loads(ended.stdout)
    assert report["schema"] == 1
    return report


def blob_bytes(daemon: DaemonProcess) -> int:
    """What the blobs take on disk, as `du` counts."""
    return taken_bytes(daemon.blob_states().values())


def evict_and_compare(daemon: DaemonProcess, *arguments: str) -> int:
    """Evict, first dry: both must report the same, and the disk and the stats agree. Returns the blocks removed."""
    before, files = blob_bytes(daemon), len(daemon.blobs())
    with client_of(daemon) as client:
        used = client.stats()["disk"]["used_bytes"]
        dry = evict(daemon, *arguments, "--dry-run")
        assert (dry["dry_run"], blob_bytes(daemon), len(daemon.blobs())) == (True, before, files)
        report = evict(daemon, *arguments)
        assert (report["blocks"], report["freed_bytes"]) == (dry["blocks"], dry["freed_bytes"])
        assert files - len(daemon.blobs()) == report["blocks"]
        # A file system may round a file otherwise than to 4096; the index may take a page or two for the change.
        assert abs(before - blob_bytes(daemon) - report["freed_bytes"]) <= PAGE * report["blocks"]
        after = client.stats()["disk"]
        assert abs(used - after["used_bytes"] - report["freed_bytes"]) <= 16 * PAGE
        assert abs(after["used_bytes"] - daemon.disk_bytes()) <= 16 * PAGE
        assert client.check()["findings"] == []
    return int(report["blocks"])


def held_tokens(daemon: DaemonProcess) -> tuple[int, int, int]:
    """Tokens held of OLD's two sequences and of NEW's, each of them fetched and compared."""
    held: list[int] = []
    with client_of(daemon) as client:
        for namespace, tokens in ((OLD, TOKENS), (OLD, BRANCH), (NEW, TOKENS)):
            hit = client.session(namespace, **SLOW).fetch([*tokens, 1])
            if hit:
                assert_rows(hit.layers, LAYOUT, tokens[: hit.n_tokens])
            else:
                assert hit.reason is Reason.EVICTED
            held.append(hit.n_tokens)
    return held[0], held[1], held[2]


def test_all_frees_everything(daemon: DaemonProcess) -> None:
    """Only the index is left."""
    assert evict_and_compare(daemon, "--all") == 8
    assert blob_bytes(daemon) == 0
    assert held_tokens(daemon) == (0, 0, 0)
    assert evict_and_compare(daemon, "--all") == 0


def test_a_namespace_goes_by_its_leading_digits(daemon: DaemonProcess) -> None:
    """The other one stays."""
    assert evict_and_compare(daemon, "--namespace", OLD.root.hex()[:12]) == 5
    assert held_tokens(daemon) == (0, 0, 700)


def test_a_prefix_goes_with_all_after_it(daemon: DaemonProcess) -> None:
    """A block that nothing leads to would be of no use."""
    with client_of(daemon) as client:
        blocks = client.list(OLD.root)["blocks"]
    tail = next(block for block in blocks if block["start"] == 512 and block["n_tokens"] == 188)
    assert evict_and_compare(daemon, "--prefix", tail["parent"][:16]) == 2
    assert held_tokens(daemon) == (256, len(BRANCH), 700)
    with client_of(daemon) as client:
        first = next(block for block in client.list(OLD.root)["blocks"] if block["start"] == 0)
    assert evict_and_compare(daemon, "--prefix", first["key"]) == 3
    assert held_tokens(daemon) == (0, 0, 700)


def test_bytes_free_at_least_so_much_least_recently_used_leaves_first(daemon: DaemonProcess) -> None:
    """And no more than a block over it; parents stay as long as they have children."""
    one_block = max(taken_bytes([info]) for info in daemon.blob_states().values())
    before = blob_bytes(daemon)
    assert evict_and_compare(daemon, "--bytes", str(one_block + 1)) >= 2
    freed = before - blob_bytes(daemon)
    assert one_block < freed <= 2 * one_block + PAGE
    assert held_tokens(daemon)[1:] == (len(BRANCH), 700)
    assert held_tokens(daemon)[0] < 700


def test_only_what_was_not_used_for_so_long_goes_by_age(daemon: DaemonProcess) -> None:
    """A use is a fetch too: the branch and its shared first block stay."""
    ahead = daemon.data_dir.with_name("ahead")
    ahead.with_suffix(".next").write_text("3600")
    ahead.with_suffix(".next").replace(ahead)
    with client_of(daemon) as client:
        assert client.session(OLD, **SLOW).fetch([*BRANCH, 1]).n_tokens == len(BRANCH)
        assert client.evict(idle_s=1800, dry_run=True)["blocks"] == 5
        assert client.evict(idle_s=1800)["blocks"] == 5
    assert held_tokens(daemon) == (256, len(BRANCH), 0)
    assert evict_and_compare(daemon, "--idle", "1h") == 0


def test_selections_narrow_each_other(daemon: DaemonProcess) -> None:
    """A namespace and a number of bytes: no block of another namespace pays for it."""
    assert evict_and_compare(daemon, "--namespace", NEW.root.hex()[:12], "--bytes", "1GB") == 3
    assert held_tokens(daemon) == (700, len(BRANCH), 0)
    for selection in (("--namespace", NEW.root.hex()[:12]), ("--prefix", "ff" * 32)):
        ended = run_here(["evict", *selection], daemon.environ())
        assert ended.returncode == 1 and "starts with" in ended.stderr, ended
    assert held_tokens(daemon) == (700, len(BRANCH), 0)


def test_what_was_evicted_stays_evicted_after_a_crash(tmp_path: Path) -> None:
    """The index says so first, and files without a row are unlinked at the start."""
    with DaemonProcess(tmp_path / "data", profile="raw") as daemon, client_of(daemon) as client:
        assert client.session(OLD, **SLOW).store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).durable
        assert client.evict(all=True)["blocks"] == 3
        daemon.kill()
        daemon.start()
        assert daemon.blobs() == []
        assert not client_of(daemon).session(OLD, **SLOW).fetch(TOKENS)


@pytest.mark.parametrize("tokens", [TOKENS, [*TOKENS, *range(3000, 3500)]], ids=["equal", "longer"])
def test_a_prompt_that_was_evicted_is_stored_in_full_by_the_next_store(
    daemon: DaemonProcess, tokens: list[int]
) -> None:
    """The session believes that the daemon holds its beginning, and hears that it does not: nobody waits for it."""
    with client_of(daemon) as client:
        session = client.session(OLD, **SLOW)
        assert session.store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).stored_tokens == len(TOKENS)
        client.evict(all=True)
        assert session.store(tokens, make_layers(LAYOUT, tokens)).reason is Reason.OK
        assert session.flush() and session.match([*tokens, 1]).n_tokens == len(tokens)
        hit = session.fetch([*tokens, 1])
        assert_rows(hit.layers, LAYOUT, tokens)


def test_what_a_session_keeps_to_start_over_is_let_go_when_the_daemon_holds_its_part(daemon: DaemonProcess) -> None:
    """The caller's arrays are the caller's again; a store that is known to be new keeps nothing at all."""
    longer = [*TOKENS, *range(3000, 3500)]
    with client_of(daemon) as client:
        session = client.session(OLD, **SLOW)
        assert session.store(TOKENS, make_layers(LAYOUT, TOKENS)).reason is Reason.OK
        assert session.flush() and session._storer._again is None
        assert session.store(longer, make_layers(LAYOUT, longer)).reason is Reason.OK
        assert session.flush() and session.match([*longer, 1]).n_tokens == len(longer)
        assert session._storer._again is not None and session._storer._again.request is None
