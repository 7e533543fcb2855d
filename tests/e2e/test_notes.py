"""What is remembered of a request is noted after its answer: no request waits for it, and nothing gets out of order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvstore.client.client import Client
from kvstore.core.blocks import Reason, pack_tokens
from kvstore.server.notes import NOTED_S, NOTES_MAX
from tests.support.daemon import SERVE, DaemonProcess, run_cli
from tests.support.sessions import client_of, patient
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=1, width=32)
# What must not come while the notes are held is waited for so long: a slow machine hides a fault, and makes none.
HELD_S = 0.5
# A daemon whose notes are held until a file is there.
HELD = """
import os, time
from kvstore.server import notes
from kvstore.server.admin import admin
from kvstore.telemetry.why import Why
note = Why.note
def held(*arguments, **named):
    while not os.path.exists({gate!r}):
        time.sleep(0.005)
    note(*arguments, **named)
Why.note = held
notes.NOTED_S = admin.NOTED_S = {noted_s}
"""


class Held:
    """A client of such a daemon."""

    def __init__(self, client: Client, gate: Path, environ: dict[str, str]) -> None:
        self.client, self.environ = client, environ
        self.let_go = gate.touch
        self.session = patient(client, make_namespace(LAYOUT))

    def told(self) -> dict[str, Any]:
        """All that is remembered, once what is under way is noted."""
        return dict(self.client.why(last=256))

    def store(self, tokens: list[int]) -> bool:
        """Whether a store lasts."""
        return self.session.store(tokens, make_layers(LAYOUT, tokens), wait=True).durable

    def comes_once_let_go(self, call: Callable[[], Any]) -> Any:
        """The answer of a call, which waits for the notes."""
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(call)
            try:
                with pytest.raises(TimeoutError):
                    answer.result(timeout=HELD_S)
            finally:
                self.let_go()
            return answer.result()


@contextlib.contextmanager
def held(folder: Path, noted_s: float = 600.0) -> Iterator[Held]:
    """Run one. It ends only once its notes are let go."""
    gate = folder / "gate"
    program = HELD.format(gate=str(gate), noted_s=noted_s) + SERVE
    with DaemonProcess(folder / "data", program=program) as daemon, client_of(daemon) as client:
        try:
            yield Held(client, gate, daemon.environ())
        finally:
            gate.touch()


def test_a_request_is_answered_before_it_is_noted_and_an_admin_sees_it_all_the_same(tmp_path: Path) -> None:
    """The admin waits for what is under way, and `stats` says how much that is."""
    with held(tmp_path) as daemon:
        for number in range(4):
            assert daemon.session.match([number] * 100).reason is Reason.IDENTITY
        assert daemon.client.stats()["load"]["waiting"] == {"note": 3}, "the first one has its thread"
        found = daemon.comes_once_let_go(daemon.told)["found"]
        assert [one["prompt_tokens"] for one in found] == [100] * 4


def test_a_store_waits_until_the_request_before_it_is_noted(tmp_path: Path) -> None:
    """Else what it stores would be told as what was there, and its end would find no request."""
    with held(tmp_path) as daemon:
        tokens = list(range(1000, 1300))
        assert daemon.store(tokens)
        other = tokens[:100] + list(range(5000, 5200))
        assert daemon.session.fetch(other).n_tokens == 100
        assert daemon.comes_once_let_go(lambda: daemon.store(other))
        (entry,) = (one for one in daemon.told()["found"] if one["given_tokens"] == 100)
        assert entry["cause"] == "changed" and entry["stored"] == pack_tokens(tokens[100:112]).hex()
        assert entry["store"] is not None and entry["store"]["stored_tokens"] == 300


def test_a_note_that_takes_too_long_holds_up_no_store(tmp_path: Path) -> None:
    """The disk is slow: the store goes on. What may be wrong by then is not kept, and that is counted."""
    with held(tmp_path, NOTED_S) as daemon:
        tokens = list(range(1000, 1300))
        for _ in range(2):
            assert not daemon.session.fetch(tokens)
        assert daemon.store(tokens)
        assert daemon.session.match(tokens).n_tokens == 299
        daemon.let_go()
        answer = daemon.told()
        assert [one["given_tokens"] for one in answer["found"]] == [299] and answer["not_kept"] == 2
        assert daemon.session.match(tokens).n_tokens == 299 and daemon.store([*tokens, 1])
        assert len(daemon.told()["found"]) == 2, "later ones are noted as ever"


def test_why_answers_without_the_notes_that_do_not_come_and_says_how_many(tmp_path: Path) -> None:
    """Else a disk that hangs would leave whoever asks without a word."""
    with held(tmp_path, HELD_S) as daemon:
        for number in range(3):
            assert daemon.session.match([number] * 100).reason is Reason.IDENTITY
        answer = daemon.told()
        assert (answer["found"], answer["not_noted"]) == ([], 3)
        shown = run_cli(["why", "--last", "9"], daemon.environ)
        assert shown.returncode == 0 and "3 requests not remembered yet" in shown.stderr
        daemon.let_go()
        while (answer := daemon.told())["not_noted"]:
            pass
        assert len(answer["found"]) == 3


def test_requests_that_cannot_be_noted_in_time_are_counted(tmp_path: Path) -> None:
    """No more than NOTES_MAX wait, since each holds its prompt; one more is being noted."""
    with held(tmp_path) as daemon:
        for number in range(NOTES_MAX + 16):
            assert daemon.session.match([number] * 100).reason is Reason.IDENTITY
        daemon.let_go()
        answer = daemon.told()
        assert (len(answer["found"]), answer["not_kept"]) == (NOTES_MAX + 1, 15)
