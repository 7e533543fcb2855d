"""The scrub: damage is found although nobody asks, at a rate, over restarts, and then not again for a while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvstore.core.blocks import Reason
from kvstore.engine import Engine
from kvstore.engine import check as scrubbing
from tests.support.engine import blob_path, find, namespace, options, put, require_sound

NS = namespace()
SEQUENCES = [[number, *range(300)] for number in range(5)]
FAST = {"scrub_bytes_per_s": 1 << 30}


class Clock:
    """Seconds of a wall clock and of a steady one, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.set_back = 1_800_000_000.0, 0.0
        monkeypatch.setattr(scrubbing.time, "monotonic", lambda: self.now)

    def __call__(self) -> float:
        return self.now - self.set_back


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """One that both the engine and the scrub read."""
    return Clock(monkeypatch)


def flip(path: Path) -> None:
    """One bit of the values."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_damage_is_found_without_a_fetch_and_the_pass_has_a_date(tmp_path: Path, clock: Clock) -> None:
    """It goes to quarantine, and the next fetch says why it is shorter."""
    with Engine.open(tmp_path / "data", options(**FAST), clock=clock) as engine:
        for tokens in SEQUENCES:
            put(engine, NS, tokens)
        flip(blob_path(engine, find(engine, NS, SEQUENCES[2]).slices[1].row))
        assert engine.stats().scrubbed_s == 0
        clock.now += 1
        engine.scrub()
        stats = engine.stats()
        assert (stats.scrubbed_s, stats.damaged, stats.quarantined) == (int(clock.now), 1, 1)
        match = find(engine, NS, SEQUENCES[2])
        assert (match.n_tokens, match.reason) == (256, Reason.CORRUPT)
        require_sound(engine)


def test_a_pass_begins_again_only_after_the_interval(tmp_path: Path, clock: Clock) -> None:
    """Over a restart too; and at once if the clock was set back behind the last one."""
    with Engine.open(tmp_path / "data", options(**FAST), clock=clock) as engine:
        put(engine, NS, SEQUENCES[0])
        clock.now += 1
        engine.scrub()
        first = engine.stats().scrubbed_s
    with Engine.open(tmp_path / "data", options(**FAST), clock=clock) as engine:
        for days, set_back, is_later in ((6, 0, False), (2, 0, True), (0, 30, True)):
            clock.now += days * 86_400
            clock.set_back += set_back * 86_400
            scrubbed = engine.stats().scrubbed_s
            engine.scrub()
            clock.now += 1
            engine.scrub()
            assert (engine.stats().scrubbed_s != scrubbed) == is_later
    assert first


def test_the_rate_holds_and_a_restart_goes_on_where_it_was(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blob a second at most, here; none is read twice in a pass."""
    read: list[bytes] = []
    slow = {"scrub_bytes_per_s": 1000}

    def opened() -> Engine:
        return Engine.open(tmp_path / "data", options(**slow), clock=clock)

    recheck = scrubbing.recheck

    def watched(shared: Any, key: bytes) -> bool:
        read.append(key)
        return recheck(shared, key)

    monkeypatch.setattr(scrubbing, "recheck", watched)

    with opened() as engine:
        for tokens in SEQUENCES:
            put(engine, NS, tokens)
        total = engine.stats().blobs
    for _ in range(100_000):
        with opened() as engine:
            before = len(read)
            for _ in range(20):
                clock.now += 1
                engine.scrub()
            assert len(read) - before <= 5
            if engine.stats().scrubbed_s:
                break
    assert len(read) == total == len(set(read)) and read == sorted(read)


def test_without_a_rate_nothing_is_read(tmp_path: Path, clock: Clock) -> None:
    """Off is off."""
    with Engine.open(tmp_path / "data", options(), clock=clock) as engine:
        put(engine, NS, SEQUENCES[0])
        flip(blob_path(engine, find(engine, NS, SEQUENCES[0]).slices[0].row))
        clock.now += 100
        engine.scrub()
        assert (engine.stats().scrubbed_s, engine.stats().damaged) == (0, 0)
