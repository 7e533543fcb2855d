"""The budget on disk, kept while stores come in, and the order in which blocks leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.client.client import Client
from kvstore.core.blocks import Reason
from tests.support.daemon import DaemonProcess
from tests.support.files import files_below, taken_bytes
from tests.support.sessions import Rows, assert_same, client_of, cut, fetch, hit_rows, normal_rows, patient
from tests.support.sessions import store as store_all
from tests.support.synthetic import make_layout, make_namespace

LAYOUT = make_layout()
NAMESPACE = make_namespace(LAYOUT)
BUDGET_BYTES = 3_000_000
ROWS = normal_rows(LAYOUT, 1024)


def sequence(number: int, n_tokens: int) -> list[int]:
    """Tokens that no other sequence starts with."""
    return list(range(number * 10_000, number * 10_000 + n_tokens))


def hit_length(client: Client, tokens: list[int]) -> int:
    """How much of a sequence is there, without counting as use."""
    return patient(client, NAMESPACE).match([*tokens, 1]).n_tokens


def store(client: Client, tokens: list[int], rows: Rows = ROWS) -> int:
    """By a worker that remembers nothing."""
    return store_all(patient(client, NAMESPACE), tokens, rows)


def test_used_bytes_and_disk_stay_within_the_budget(tmp_path: Path) -> None:
    """Thirty stores of half a megabyte in three: after each the daemon's count and the disk's are in it, and agree."""
    with (
        DaemonProcess(tmp_path / "data", profile="raw", budget_bytes=BUDGET_BYTES) as daemon,
        client_of(daemon) as client,
    ):
        for number in range(30):
            store(client, sequence(number, 400 + number))
            disk = client.stats()["disk"]
            files = files_below(daemon.data_dir).items()
            on_disk = taken_bytes(info for path, info in files if path.parent != daemon.data_dir)
            assert disk["used_bytes"] <= BUDGET_BYTES
            assert on_disk <= disk["used_bytes"]
            assert disk["blobs"] == len(daemon.blobs())
        assert 3 <= sum(hit_length(client, sequence(number, 400)) == 400 for number in range(30)) < 8
        assert hit_length(client, sequence(29, 429)) == 429
        assert_same(hit_rows(fetch(patient(client, NAMESPACE), [*sequence(29, 429), 1])), cut(ROWS, 0, 429), LAYOUT)
        assert client.check()["findings"] == []


def test_leaves_go_first_and_the_least_recently_used_of_them(tmp_path: Path) -> None:
    """Of three sequences the one not used since loses its end, then more of it; what is left of it still serves."""
    with DaemonProcess(tmp_path / "data", profile="raw") as daemon, client_of(daemon) as client:
        for number in range(3):
            store(client, sequence(number, 1024))
        for number in (0, 2):
            fetch(patient(client, NAMESPACE), [*sequence(number, 1024), 1])
        for left in (768, 512, 256, 0):
            assert client.evict(bytes=1)["blocks"] == 1
            assert [hit_length(client, sequence(number, 1024)) for number in range(3)] == [1024, left, 1024]
        assert patient(client, NAMESPACE).fetch(sequence(1, 1024)).reason is Reason.EVICTED
        for left in (768, 512, 256, 0):
            client.evict(bytes=1)
            assert [hit_length(client, sequence(number, 1024)) for number in range(3)] == [left, 0, 1024]


def test_a_common_prefix_stays_as_long_as_what_follows_it(tmp_path: Path) -> None:
    """Even when the daemon was killed before it wrote down that the prefix was used again."""
    with DaemonProcess(tmp_path / "data", profile="raw") as daemon:
        shared, follower = sequence(0, 256), [*sequence(0, 256), *sequence(2, 100)]
        with client_of(daemon) as client:
            for tokens in (shared, sequence(1, 256), follower):
                store(client, tokens)
        daemon.kill()
        daemon.start()
        with client_of(daemon) as client:
            assert client.evict(bytes=1)["blocks"] == 1
            assert (hit_length(client, sequence(1, 256)), hit_length(client, follower)) == (0, 356)


@pytest.mark.parametrize("ending", ["stopped", "killed"])
def test_the_access_order_survives_a_restart(tmp_path: Path, ending: str) -> None:
    """A fetch counts as use: after the restart, under a budget that is full, the sequence not fetched goes first."""
    with DaemonProcess(tmp_path / "data", profile="raw") as daemon:
        with client_of(daemon) as client:
            for number in range(4):
                store(client, sequence(number, 512))
            for number in (2, 0, 3):
                fetch(patient(client, NAMESPACE), [*sequence(number, 512), 1])
            if ending == "killed":
                store(client, sequence(4, 1))  # the next commit takes what was noted along
            used_bytes = client.stats()["disk"]["used_bytes"]
        if ending == "killed":
            daemon.kill()
        else:
            assert daemon.stop() == 0
        daemon.start(budget_bytes=used_bytes)
        with client_of(daemon) as client:
            history = []
            for newer in (5, 6, 7):
                store(client, sequence(newer, 512))
                lengths = [hit_length(client, sequence(number, 512)) for number in (1, 2, 0, 3)]
                assert lengths == sorted(lengths) and sum(0 < length < 512 for length in lengths) <= 1
                history.append(lengths)
            assert history[0][0] == 0 and history[0][-1] == 512, history
