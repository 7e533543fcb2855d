"""Whether the remote tier may be asked, and what is found out of it on nobody's request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvstore.config import Config
from kvstore.core.breaker import Deadline
from kvstore.core.limits import default_limits
from kvstore.core.remote_words import CreateOnly
from kvstore.errors import CorruptDataError, RemoteError
from kvstore.index.rows import Row
from kvstore.remote.object_store import PROBE
from kvstore.remote.tier import RemoteTier
from kvstore.server.tier.remote_tier import Remote
from kvstore.server.tier.remote_watch import LOOK_EVERY_S, PROBES_MAX, SAMPLE_EVERY_S_MAX, Watch
from tests.support.clock import Clock
from tests.support.memory_objects import MemoryStore


def watch_over(store: MemoryStore) -> tuple[Watch, Clock]:
    """A watch that has not looked yet."""
    clock = Clock(0.0)
    tier = RemoteTier(store, lambda item: None, None, default_limits(), sync=False)
    return Watch(tier, clock), clock


def looked(watch: Watch, clock: Clock, times: int = 1) -> Watch:
    """After so many looks that were due."""
    for _ in range(times):
        watch.look()
        clock.now_s += LOOK_EVERY_S
    return watch


def test_what_create_only_puts_do_is_found_out_once_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a store that refuses the second put of a name, and of one that takes it."""
    store = MemoryStore()
    before = dict(store.objects)
    watch, clock = watch_over(store)
    assert watch.create_only == CreateOnly.UNKNOWN
    assert looked(watch, clock, 3).create_only == CreateOnly.HONOURED
    assert (store.rounds.count("create"), store.rounds.count("delete")) == (2, 1)

    def overwrite(name: str, parts: Sequence[memoryview], deadline: Deadline) -> bool:
        store.put(name, b"".join(parts))
        return True

    monkeypatch.setattr(store, "create", overwrite)
    watch = looked(*watch_over(store))
    assert watch.create_only == CreateOnly.IGNORED and watch.serves
    assert store.objects == before


def test_an_empty_tier_is_listed_less_and_less_often() -> None:
    """For an object to measure the link with. A store may bill each listing, and most tiers begin empty."""
    store = MemoryStore()
    watch, clock = watch_over(store)
    looked(watch, clock, round(86_400 / LOOK_EVERY_S))
    assert 86_400 / SAMPLE_EVERY_S_MAX <= store.rounds.count("names") < 160


@pytest.mark.parametrize("call", ["create", "delete"])
def test_a_store_that_takes_no_writes_serves_and_is_tried_a_few_times(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials that may only read, or that may not delete: there is an end of what tries leave behind."""

    def refuse(*args: object) -> bool:
        raise RemoteError("403")

    store = MemoryStore()
    monkeypatch.setattr(store, call, refuse)
    watch, clock = watch_over(store)
    assert looked(watch, clock).serves and watch.create_only == CreateOnly.UNKNOWN
    looked(watch, clock, 2 * PROBES_MAX)
    left = [name for name in store.objects if name.startswith(PROBE)]
    assert len(left) == (PROBES_MAX if call == "delete" else 0)
    assert watch.serves


def test_a_damaged_index_does_not_end_the_looks_at_the_tier(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be read is not pushed; the step ends as always, and takes what waits behind it."""
    asked: list[bytes] = []

    def chain(key: bytes) -> tuple[list[Row], int]:
        asked.append(key)
        raise CorruptDataError("a value does not match its checksum")

    engine = SimpleNamespace(transfer=SimpleNamespace(chain=chain))
    config = Config(data_dir=tmp_path / "data", remote=f"file://{tmp_path}/share")
    remote = Remote(engine, None, None, SimpleNamespace(remote=None), config)  # type: ignore[arg-type]
    remote.push([b"one", b"two"])
    remote.step()
    assert asked == [b"one", b"two"]
    assert caplog.text.count("is not pushed") == 2
