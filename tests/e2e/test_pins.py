"""`kvstore pin` and `kvstore set NAMESPACE` against a daemon, over a restart."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.client.client import Client, connect
from kvstore.core.blocks import Reason
from tests.support.daemon import DaemonProcess, run_here
from tests.support.limits import small_config
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=1, width=64)
NAMESPACE = make_namespace(LAYOUT, "small-lm")
SLOW = {"connect_ms": 30_000, "stall_ms": 30_000, "total_ms": 60_000}


def client_of(daemon: DaemonProcess) -> Client:
    """A client of this daemon."""
    return connect(config=small_config(daemon.listen))


def fill(daemon: DaemonProcess, first: int) -> list[int]:
    """Store 300 tokens from this one on."""
    tokens = list(range(first, first + 300))
    with client_of(daemon) as client:
        assert client.session(NAMESPACE, **SLOW).store(tokens, make_layers(LAYOUT, tokens), wait=True).durable
    return tokens


def reason(daemon: DaemonProcess, tokens: list[int]) -> Reason:
    """Why a fetch of a prompt gives less than everything."""
    with client_of(daemon) as client:
        return client.session(NAMESPACE, **SLOW).fetch([*tokens, 1]).reason


def verb(daemon: DaemonProcess, *arguments: str) -> dict[str, Any]:
    """The JSON of a verb that succeeds."""
    run = run_here([*arguments, "--json"], daemon.environ())
    assert run.returncode == 0, run.stderr
    answer: dict[str, Any] = json.loads(run.stdout)
    return answer


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One for all tests of the module."""
    with DaemonProcess(tmp_path_factory.mktemp("daemon") / "data") as running:
        yield running


def test_a_pinned_prompt_outlives_a_time_to_live_and_a_restart(daemon: DaemonProcess, tmp_path: Path) -> None:
    """What is not pinned expires, and the miss says so; ended by name, the pin is gone."""
    kept, other = fill(daemon, 0), fill(daemon, 10_000)
    np.save(tmp_path / "prompt.npy", np.asarray(kept))
    pinned = verb(daemon, "pin", "--prompt-file", str(tmp_path / "prompt.npy"), "--namespace", "small-lm")
    assert [one["tokens"] for one in pinned["pins"]] == [300]
    assert 0 < pinned["kept_bytes"] < pinned["kept_bytes_max"]
    set_ = run_here(["set", "small-lm", "ttl=1s", "quota=1GB", "--yes"], daemon.environ())
    assert set_.returncode == 0, set_.stderr
    assert set_.stdout.splitlines() == [
        "ttl is 1 s now (before: as the daemon's)",
        "quota is 1.0 GB now (before: none)",
    ]
    deadline = time.monotonic() + 30
    # A look is no use, as a fetch would be.
    while verb(daemon, "show", "small-lm")["namespaces"][0]["tokens"] > 300:
        assert time.monotonic() < deadline
    assert reason(daemon, other) is Reason.EXPIRED
    assert reason(daemon, kept) is Reason.OK
    daemon.stop()
    daemon.start()
    assert [one["key"] for one in verb(daemon, "pin")["pins"]] == [one["key"] for one in pinned["pins"]]
    (shown,) = verb(daemon, "show", "small-lm")["namespaces"]
    assert (shown["ttl_s"], shown["quota_bytes"]) == (1, 10**9)
    time.sleep(1.5)
    assert reason(daemon, kept) is Reason.OK
    key = pinned["pins"][0]["key"][:16]
    assert "no longer pinned: 300 tokens of small-lm" in run_here(["pin", key, "--remove"], daemon.environ()).stdout
    assert verb(daemon, "pin")["pins"] == []
    # The store is empty by now, and the namespace is still known by its alias and its id.
    assert verb(daemon, "set", "small-lm", "quota=2GB")["before"] == str(10**9)
    assert verb(daemon, "set", pinned["pins"][0]["namespace_id"], "ttl=0")["value"] == "0"


def test_a_limit_that_deletes_much_says_so(daemon: DaemonProcess) -> None:
    """And waits a minute for a script; a person on a terminal is asked, and `--yes` is an answer."""
    for number in range(3):
        fill(daemon, 20_000 + 1000 * number)
    (shown,) = verb(daemon, "show", "small-lm")["namespaces"]
    quota = f"quota={shown['bytes'] // 2}"
    run = run_here(["set", "small-lm", quota], daemon.environ())
    assert run.returncode == 0
    assert f"{quota} deletes" in run.stderr and "in a minute" in run.stderr
    assert re.search(r"WARNING about to delete .* in 60 s, unless limits change", daemon.log_text())
    assert verb(daemon, "show", "small-lm")["namespaces"][0]["bytes"] == shown["bytes"]
    verb(daemon, "set", "small-lm", quota, "--yes")
    assert verb(daemon, "show", "small-lm")["namespaces"][0]["bytes"] <= shown["bytes"] // 2
    verb(daemon, "set", "small-lm", "quota=0")


def test_limits_that_delete_much_at_a_start_do_not_wait_with_yes(daemon: DaemonProcess) -> None:
    """They wait otherwise. A limit that is set later waits all the same."""
    for number in range(3):
        fill(daemon, 20_000 + 1000 * number)
    (shown,) = verb(daemon, "show", "small-lm")["namespaces"]
    verb(daemon, "set", "small-lm", f"quota={shown['bytes'] // 2}")
    daemon.stop()
    daemon.start()
    assert verb(daemon, "show", "small-lm")["namespaces"][0]["bytes"] == shown["bytes"]
    daemon.stop()
    daemon.start(flags=["--yes"])
    half = verb(daemon, "show", "small-lm")["namespaces"][0]["bytes"]
    assert half <= shown["bytes"] // 2
    verb(daemon, "set", "small-lm", f"quota={half // 2}")
    assert verb(daemon, "show", "small-lm")["namespaces"][0]["bytes"] == half
    verb(daemon, "set", "small-lm", "quota=0")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["pin", "nothex"], 2, "is not a key"),
        (["pin", "00" * 32], 1, "nothing is stored whose key starts so"),
        (["pin", "--remove"], 2, "--remove takes a KEY"),
        (["pin", "00" * 32, "--remove"], 1, "no such pin"),
        (["set", "small-lm", "ttl=soon"], 2, "not a length of time"),
        (["set", "small-lm", "ttl=30"], 2, "no unit; write 30s, 30m, 30h, 30d or 30w"),
        (["set", "small-lm", "colour=red"], 2, "quota, ttl"),
        (["set", "daemon", "colour=red"], 2, "colour is no setting of the daemon; budget_bytes, "),
        (["set", "daemon", "profile=safe"], 2, "profile cannot be set while the daemon runs; budget_bytes, "),
        (["set", "nobody", "ttl=1d"], 1, "nobody"),
        (["set", "nobody", "quota=0"], 1, "nobody"),
    ],
)
def test_what_cannot_be_is_one_line(daemon: DaemonProcess, arguments: list[str], status: int, said: str) -> None:
    """With the exit status of its kind."""
    fill(daemon, 50_000)
    run = run_here(arguments, daemon.environ())
    assert (run.returncode, run.stdout) == (status, "")
    assert said in run.stderr
    assert len(run.stderr.strip().splitlines()) <= 3
