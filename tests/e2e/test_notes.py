"""What is remembered of a request is noted after its answer: no request waits for it, and nothing gets out of order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.client.client import Client
from kvstore.core.blocks import pack_tokens
from kvstore.server.handlers import NOTES_MAX
from tests.support.daemon import SERVE, DaemonProcess
from tests.support.sessions import client_of, patient
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=1, width=32)
NOTE_S = 0.5
# A daemon that takes its time to note a request.
SLOW = f"""
import time
from kvstore.telemetry.why import Why
note = Why.note
def slowly(*arguments):
    time.sleep({NOTE_S})
    note(*arguments)
Why.note = slowly
"""


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """Of such a daemon."""
    with DaemonProcess(tmp_path / "data", program=SLOW + SERVE) as daemon, client_of(daemon) as client:
        yield client


def test_a_request_is_answered_before_it_is_noted_and_an_admin_sees_it_all_the_same(client: Client) -> None:
    """The admin waits for what is under way."""
    session = patient(client, make_namespace(LAYOUT))
    began_s = time.monotonic()
    for number in range(4):
        assert not session.match([number] * 100).n_tokens
    assert time.monotonic() - began_s < 3 * NOTE_S, "four notes take longer"
    found = client.why(last=9)["found"]
    assert [one["prompt_tokens"] for one in found] == [100] * 4
    assert time.monotonic() - began_s > 4 * NOTE_S


def test_a_store_waits_until_the_request_before_it_is_noted(client: Client) -> None:
    """Else what it stores would be told as what was there, and its end would find no request."""
    session = patient(client, make_namespace(LAYOUT))
    tokens = list(range(1000, 1300))
    assert session.store(tokens, make_layers(LAYOUT, tokens), wait=True).durable
    other = tokens[:100] + list(range(5000, 5200))
    assert session.fetch(other).n_tokens == 100
    assert session.store(other, make_layers(LAYOUT, other), wait=True).durable
    (entry,) = (one for one in client.why(last=9)["found"] if one["given_tokens"] == 100)
    assert entry["cause"] == "changed" and entry["stored"] == pack_tokens(tokens[100:112]).hex()
    assert entry["store"] is not None and entry["store"]["stored_tokens"] == 300


def test_requests_that_cannot_be_noted_in_time_are_counted(client: Client) -> None:
    """No more than NOTES_MAX wait, since each holds its prompt."""
    session = patient(client, make_namespace(LAYOUT))
    count = NOTES_MAX + 16
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: session.match([number] * 100), range(count)))
    answer = client.why(last=256)
    assert len(answer["found"]) + answer["not_kept"] == count
    assert answer["not_kept"] >= 8
