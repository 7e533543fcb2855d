"""Daemons over a share that is a real volume: it is full, or unmounted in the middle of a push and of a read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.client.results import Hit
from tests.e2e.test_remote import (
    LAYOUT,
    TOKENS,
    fetched,
    objects_of,
    pair,
    pushed,
    remote_of,
    share_of,
    wait_for,
    wait_serving,
)
from tests.faults import cuts, disk
from tests.faults.test_daemon_disk import NOT_SERVING, SERVING, health
from tests.support.daemon import DaemonProcess, run_cli
from tests.support.sessions import assert_same, client_of, cut, hit_rows, patient
from tests.support.synthetic import make_layers, make_namespace

pytestmark = pytest.mark.skipif(bool(cuts.missing()), reason=f"NOT RUN: {cuts.missing()}")

# Less than a blob has, and more than the file that says what a namespace is.
LEFT_BLOCKS = 20
# A push of one blob takes about a second, so that the share goes away between two, or during one.
SLOWLY = {"remote_push_bytes_per_s_max": 300_000}


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[tuple[DaemonProcess, DaemonProcess]]:
    """A pair over a volume of its own, and the first one pushes slowly."""
    with disk.mounted(tmp_path / "share", "size=32m"), pair(tmp_path, limits=SLOWLY) as (one, other):
        yield other, one


def health_is(daemon: DaemonProcess, answers: int, takes: int) -> bool:
    """Of the tier: whether it answers, and whether it takes what is pushed."""
    return (health(daemon, "kvstore.remote"), health(daemon, "kvstore.remote.writes")) == (answers, takes)


def findings(daemon: DaemonProcess) -> list[str]:
    """The objects that `check --remote` finds wrong."""
    report = json.loads(run_cli(["check", "--remote", "--json"], daemon.environ()).stdout)
    return [one["name"] for one in report["findings"]]


def test_a_full_share_stops_pushes_and_nothing_else_until_it_has_room(
    daemons: tuple[DaemonProcess, DaemonProcess],
) -> None:
    """It is said in health, stats, doctor and once in the log; reads from it and hits from here go on."""
    one, other = daemons
    before, namespace = make_namespace(LAYOUT, "before-lm"), make_namespace(LAYOUT, "full-lm")
    share = share_of(one)
    with client_of(one) as writer, client_of(other) as client:
        want = pushed(writer, before, TOKENS[:600])
        wait_for(lambda: health_is(one, SERVING, SERVING))
        held = objects_of(share)
        disk.fill(share, LEFT_BLOCKS)
        assert patient(writer, namespace).store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).durable
        assert fetched(writer, namespace)
        wait_for(lambda: remote_of(writer)["state"] == "full" and health_is(one, SERVING, NOT_SERVING))
        told = remote_of(writer)
        assert "is full" in told["detail"] and "evict --remote" in told["detail"]
        assert (told["queued_blobs"], told["not_pushed"].get("failed", 0)) == (6, 0)
        looked = run_cli(["doctor"], one.environ())
        assert looked.returncode == 1 and re.search("FIX +remote +full; .*evict --remote", looked.stdout)
        assert [path for path in objects_of(share) if path.name != "filler"] == held and findings(one) == ["filler"]
        assert fetched(writer, namespace).n_tokens == len(TOKENS) - 1
        wait_serving(client)
        assert_same(hit_rows(fetched(client, before, TOKENS[:600])), want, LAYOUT)
        (share / "filler").unlink()
        wait_for(lambda: remote_of(writer)["state"] == "serving" and not remote_of(writer)["queued_blobs"])
        assert len(objects_of(share)) == len(held) + 6 and not findings(one)
        assert remote_of(writer)["not_pushed"].get("failed", 0) == 0
        wait_for(lambda: health_is(one, SERVING, SERVING))
        assert fetched(client, namespace).n_tokens == len(TOKENS) - 1
    assert one.log_text().count(" WARNING nothing is pushed any more: ") == 1
    assert one.log_text().count(" INFO blobs are pushed again: ") == 1


def test_a_share_that_is_unmounted_in_the_middle_is_not_filled_and_pushed_to_when_it_is_back(
    daemons: tuple[DaemonProcess, DaemonProcess], tmp_path: Path
) -> None:
    """While one daemon pushes to it and the other reads from it; both serve what they have, and nothing is lost."""
    one, other = daemons
    shared, pushing = make_namespace(LAYOUT, "shared-lm"), make_namespace(LAYOUT, "pushing-lm")
    share, real = share_of(one), tmp_path / "real"
    real.mkdir()
    with client_of(one) as writer, client_of(other) as client, ThreadPoolExecutor(1) as pool:
        want = pushed(writer, shared)
        disk.bind(share, real)
        try:
            wait_serving(client)
            assert patient(writer, pushing).store(TOKENS, make_layers(LAYOUT, TOKENS), wait=True).durable
            done = remote_of(writer)["pushed_blobs"]
            assert fetched(writer, pushing)
            wait_for(lambda: remote_of(writer)["pushed_blobs"] > done)
            reading = pool.submit(fetched, client, shared)
            disk.unmount(share)
            found = reading.result()
            if isinstance(found, Hit):
                assert_same(hit_rows(found), cut(want, 0, found.n_tokens), LAYOUT)
            for told in (writer, client):
                wait_for(lambda told=told: remote_of(told)["state"] == "unmarked")
            assert remote_of(writer)["pushed_blobs"] < done + 6
            assert fetched(writer, pushing).n_tokens == len(TOKENS) - 1
            assert list(share.iterdir()) == []
            disk.bind(real, share)
            wait_serving(client)
            wait_for(lambda: fetched(client, shared).n_tokens == len(TOKENS) - 1)
            assert_same(hit_rows(fetched(client, shared)), want, LAYOUT)
            wait_for(lambda: not remote_of(writer)["queued_blobs"])
            assert remote_of(writer)["not_pushed"].get("failed", 0) == 0 and not findings(one)
            assert fetched(client, pushing).n_tokens == len(TOKENS) - 1
        finally:
            disk.unmount(real)
