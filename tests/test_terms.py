"""Pins, quotas and times to live: what stays, what goes and why, and that both survive restarts and rebuilds."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.core.blocks import Reason, pack_tokens
from kvstore.core.keys import Chain
from kvstore.engine import Engine, EngineOptions, Selection, Terms
from kvstore.engine.keep import PINS_MAX
from kvstore.errors import LimitError, NotFoundError
from tests.support.clock import Clock
from tests.support.engine import (
    HYBRID,
    checkpoint,
    disk_usage,
    find,
    namespace,
    options,
    put,
    put_checkpoint,
    require_sound,
    sequence,
)

NS, OTHER = namespace(), namespace("other weights")
HYBRIDS = namespace("hybrid", HYBRID)
DAY_S = 86_400


def prompt(number: int, n_tokens: int = 300) -> list[int]:
    """Tokens that no other prompt begins with."""
    return [number * 1_000_003, *range(n_tokens - 1)]


def chain_of(tokens: list[int]) -> Chain:
    """The chain of a prompt."""
    return Chain(NS.root, pack_tokens(tokens))


def last_key(engine: Engine, tokens: list[int]) -> bytes:
    """The key of the last block of a stored prompt."""
    return engine.match(chain_of(tokens)).slices[-1].row.key


@pytest.fixture
def clock() -> Clock:
    """Stands until it is moved."""
    return Clock()


@pytest.fixture
def engine(tmp_path: Path, clock: Clock) -> Iterator[Engine]:
    """An engine with room for about forty prompts."""
    small = options(budget_bytes=2 << 20, durability="none")
    with Engine.open(tmp_path / "data", small, clock=clock, steady=clock) as engine:
        yield engine


def test_a_pinned_prompt_stays_while_everything_else_goes(engine: Engine) -> None:
    """Also what leads to it; and it goes like others once the pin is removed."""
    put(engine, NS, prompt(1, 600))
    key = last_key(engine, prompt(1, 600))
    kept = engine.keeper.pin(NS.root, [key])
    assert kept == engine.stats().namespaces[0].disk_bytes
    for number in range(2, 80):
        put(engine, NS, prompt(number))
    assert find(engine, NS, prompt(2)).reason is Reason.EVICTED
    assert find(engine, NS, prompt(1, 600)).n_tokens == 600
    engine.keeper.unpin([key])
    for number in range(200, 280):
        put(engine, NS, prompt(number))
    assert find(engine, NS, prompt(1, 600)).n_tokens == 0
    require_sound(engine)


def test_what_is_pinned_counts_as_deleted_by_no_limit(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """So there is no warning and no wait for a limit that deletes nothing, and no prompt is threatened that stays."""
    put(engine, NS, prompt(1, 600))
    engine.keeper.pin(NS.root, [last_key(engine, prompt(1, 600))])
    (usage,) = engine.stats().namespaces
    for limit in ({"budget_bytes": 1}, {"root": NS.root, "terms": Terms(quota_bytes=1)}):
        assert engine.keeper.would_delete(**limit) == (0, usage.disk_bytes)
    with caplog.at_level("WARNING"):
        engine.limit(1, 0)
    assert "about to delete" not in caplog.text
    put(engine, OTHER, prompt(2))
    assert find(engine, NS, prompt(1, 600)).n_tokens == 600


def test_pins_and_terms_survive_a_restart_and_a_rebuild(tmp_path: Path, engine: Engine, clock: Clock) -> None:
    """They lie in settings/, which every rebuild of the index obeys."""
    put(engine, NS, prompt(1))
    put(engine, OTHER, prompt(1))
    engine.keeper.pin(NS.root, [last_key(engine, prompt(1))])
    engine.keeper.change_terms(OTHER.root, Terms(quota_bytes=1 << 30, ttl_s=DAY_S))
    engine.close()
    shutil.rmtree(tmp_path / "data" / "index")
    with Engine.open(tmp_path / "data", options(budget_bytes=2 << 20, durability="none"), clock=clock) as again:
        assert again.keeper.terms(OTHER.root) == Terms(1 << 30, DAY_S)
        for number in range(2, 80):
            put(again, NS, prompt(number))
        assert find(again, NS, prompt(1)).n_tokens == 300
        require_sound(again)


def test_nothing_is_evicted_between_the_decision_and_the_write_of_a_pin(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pin that was acknowledged is of something that is there."""
    put(engine, NS, prompt(1))
    key, write = last_key(engine, prompt(1)), engine._shared.keep.add_pins

    def evict_first(root: bytes, keys: Iterable[bytes]) -> None:
        engine.evict(Selection(bytes=1 << 30))
        write(root, keys)

    monkeypatch.setattr(engine._shared.keep, "add_pins", evict_first)
    engine.keeper.pin(NS.root, [key])
    assert find(engine, NS, prompt(1)).n_tokens == 300


def test_pins_keep_at_most_a_fifth_of_the_budget(engine: Engine) -> None:
    """What would pass it is refused, and nothing changes."""
    for number in range(100):
        put(engine, NS, prompt(number))
        key = last_key(engine, prompt(number))
        before = engine.keeper.pinned_bytes()[0]
        room = engine.keeper.pinned_bytes()[1] - before
        if sum(part.row.blob_bytes for part in engine.match(chain_of(prompt(number))).slices) > room:
            with pytest.raises(LimitError, match="1/5 of the budget"):
                engine.keeper.pin(NS.root, [key])
            break
        engine.keeper.pin(NS.root, [key])
    assert len(engine.keeper.pins) == number > 0
    assert engine.keeper.pinned_bytes() == (before, (2 << 20) // 5)


def test_a_tail_that_is_pinned_stays_beside_the_longer_one(engine: Engine) -> None:
    """A longer tail takes the place of shorter ones, but not of what somebody pinned."""
    put(engine, NS, prompt(1, 40))
    key = last_key(engine, prompt(1, 40))
    engine.keeper.pin(NS.root, [key])
    put(engine, NS, prompt(1, 80))
    assert len(engine.show(key)) == 1
    assert find(engine, NS, prompt(1, 80)).n_tokens == 80


def test_a_pin_of_what_was_damaged_and_stored_again_holds(engine: Engine) -> None:
    """The pin is of the tokens, not of the file."""
    put(engine, NS, prompt(1))
    key = last_key(engine, prompt(1))
    engine.keeper.pin(NS.root, [key])
    (info,) = engine.show(key)
    Path(info.path).write_bytes(b"\0" * Path(info.path).stat().st_size)
    assert engine.recheck(key)
    put(engine, NS, prompt(1))
    for number in range(2, 80):
        put(engine, NS, prompt(number))
    assert find(engine, NS, prompt(1)).n_tokens == 300


@pytest.mark.parametrize("selection", ["all", "namespace", "key"])
def test_evicting_by_name_ends_the_pin(engine: Engine, selection: str) -> None:
    """Whoever names it means it; a dry run says the same."""
    put(engine, NS, prompt(1))
    key = last_key(engine, prompt(1))
    engine.keeper.pin(NS.root, [key])
    named = {"all": Selection(all=True), "namespace": Selection(NS.root), "key": Selection(key_prefix=key)}[selection]
    planned = engine.evict(named, dry_run=True)
    assert engine.evict(named) == planned
    assert planned.blocks > 0
    assert not engine.keeper.pins
    assert find(engine, NS, prompt(1)).n_tokens < 300


@pytest.mark.parametrize("selection", [Selection(idle_s=1), Selection(bytes=1 << 30)])
def test_evicting_by_age_or_bytes_leaves_pins(engine: Engine, clock: Clock, selection: Selection) -> None:
    """They select what is worth least, and somebody said that this is worth something."""
    put(engine, NS, prompt(1))
    put(engine, NS, prompt(2))
    engine.keeper.pin(NS.root, [last_key(engine, prompt(1))])
    clock.now_s += DAY_S
    engine.evict(selection)
    assert find(engine, NS, prompt(1)).n_tokens == 300
    assert find(engine, NS, prompt(2)).n_tokens == 0


def test_a_quota_takes_from_its_own_namespace_only(engine: Engine) -> None:
    """At once when it is set, and at every store after that; the oldest goes first."""
    for number in range(8):
        put(engine, NS, prompt(number))
        put(engine, OTHER, prompt(number))
    usage = {one.info.root: one.disk_bytes for one in engine.stats().namespaces}
    quota_bytes = usage[NS.root] // 2
    assert engine.keeper.would_delete(root=NS.root, terms=Terms(quota_bytes))[0] == usage[NS.root] - quota_bytes
    engine.keeper.change_terms(NS.root, Terms(quota_bytes))
    for number in range(8, 16):
        put(engine, NS, prompt(number))
        after = {one.info.root: one.disk_bytes for one in engine.stats().namespaces}
        assert after[NS.root] <= quota_bytes
        assert after[OTHER.root] == usage[OTHER.root]
        assert find(engine, NS, prompt(number)).n_tokens == 300
    assert find(engine, NS, prompt(0)).reason is Reason.EVICTED
    assert engine.stats().evictions["quota"][0] > 0
    require_sound(engine)


def test_what_is_not_used_within_its_time_to_live_expires(engine: Engine, clock: Clock) -> None:
    """A use renews it; other namespaces keep theirs; the miss says expired."""
    put(engine, NS, prompt(1))
    put(engine, NS, prompt(2))
    put(engine, OTHER, prompt(1))
    engine.keeper.change_terms(NS.root, Terms(ttl_s=DAY_S))
    clock.now_s += DAY_S - 10
    engine.touch(engine.match(chain_of(prompt(2))).slices)
    engine.maintain()
    assert find(engine, NS, prompt(1)).n_tokens == 300
    clock.now_s += 20
    engine.maintain()
    assert find(engine, NS, prompt(1)).reason is Reason.EXPIRED
    assert find(engine, NS, prompt(2)).n_tokens == 300
    assert find(engine, OTHER, prompt(1)).n_tokens == 300
    assert engine.stats().evictions["ttl"][0] == 2
    require_sound(engine)


def test_a_general_time_to_live_holds_where_a_namespace_has_none(engine: Engine, clock: Clock) -> None:
    """And is enforced when the store is opened, too."""
    put(engine, NS, prompt(1))
    put(engine, OTHER, prompt(1))
    engine.keeper.change_terms(OTHER.root, Terms(ttl_s=30 * DAY_S))
    clock.now_s += 2 * DAY_S
    assert engine.keeper.would_delete(ttl_s=DAY_S)[0] > 0
    engine.limit(2 << 20, 0, DAY_S)
    assert find(engine, NS, prompt(1)).n_tokens == 0
    assert find(engine, OTHER, prompt(1)).n_tokens == 300


def test_a_clock_that_jumps_ahead_expires_nothing_by_it(tmp_path: Path, clock: Clock) -> None:
    """At a start or while running: more than a day of it counts only as time passes; then what is due goes."""
    steady = Clock()
    limits = options(durability="none", ttl_s=30 * DAY_S)

    def opened() -> Engine:
        return Engine.open(tmp_path / "data", limits, clock=clock, steady=steady)

    with opened() as engine:
        put(engine, NS, prompt(1))
        clock.now_s += 40 * DAY_S
        engine.maintain()
        assert find(engine, NS, prompt(1)).n_tokens == 300
    for _ in range(3):
        with opened() as engine:
            steady.now_s += 60
            engine.maintain()
            assert find(engine, NS, prompt(1)).n_tokens == 300
            assert engine.keeper.would_delete(ttl_s=30 * DAY_S)[0] == 0
    clock.now_s -= 40 * DAY_S
    with opened() as engine:
        put(engine, NS, prompt(2))
        for _ in range(20):
            clock.now_s += DAY_S
            steady.now_s += DAY_S
            engine.maintain()
        engine.touch(engine.match(chain_of(prompt(2))).slices)
        clock.now_s += 20 * DAY_S
        for _ in range(13):
            steady.now_s += 3600
            engine.maintain()
        assert find(engine, NS, prompt(1)).reason is Reason.EXPIRED
        assert find(engine, NS, prompt(2)).n_tokens == 300


def test_what_is_stored_while_a_clock_is_behind_does_not_expire_when_it_is_set_right(
    tmp_path: Path, clock: Clock
) -> None:
    """Its time is too old. A clock that was not set at all, as at boot, delays nothing once it is."""
    steady = Clock()
    limits = options(durability="none", ttl_s=DAY_S)
    with Engine.open(tmp_path / "data", limits, clock=clock, steady=steady) as engine:
        clock.now_s -= 40 * DAY_S
        engine.maintain()
        put(engine, NS, prompt(1))
        clock.now_s += 40 * DAY_S
        engine.maintain()
        assert find(engine, NS, prompt(1)).n_tokens == 300
    now_s, clock.now_s = clock.now_s, 1000.0
    with Engine.open(tmp_path / "new", limits, clock=clock, steady=steady) as engine:
        engine.maintain()
        clock.now_s = now_s
        put(engine, NS, prompt(1))
        engine.maintain()
        for moved in (clock, steady):
            moved.now_s += 2 * DAY_S
        engine.maintain()
        assert find(engine, NS, prompt(1)).reason is Reason.EXPIRED


def test_a_time_to_live_holds_over_a_night_without_power(tmp_path: Path, clock: Clock) -> None:
    """A day at most counts at once."""
    limits = options(durability="none", ttl_s=DAY_S)
    with Engine.open(tmp_path / "data", limits, clock=clock, steady=clock) as engine:
        put(engine, NS, prompt(1))
        clock.now_s += DAY_S // 2
        engine.maintain()
    clock.now_s += DAY_S // 2 + 10
    with Engine.open(tmp_path / "data", limits, clock=clock, steady=clock) as engine:
        assert find(engine, NS, prompt(1)).reason is Reason.EXPIRED


@pytest.mark.parametrize("cause", ["budget", "ttl", "quota"])
def test_limits_that_delete_much_wait_for_a_minute(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, cause: str
) -> None:
    """At a start, with a warning: meanwhile what is stored is served, and nothing that needs room is stored."""
    with Engine.open(tmp_path / "data", options(durability="none"), clock=clock, steady=clock) as engine:
        for number in range(20):
            put(engine, NS, prompt(number))
        half = engine.stats().stored_bytes // 2
        budget = engine.used_bytes - half
        clock.now_s += DAY_S // 2
        put(engine, NS, prompt(20))
    if cause == "quota":
        with Engine.open(tmp_path / "data", options(deletion_wait_s=60), clock=clock, steady=clock) as engine:
            engine.keeper.change_terms(NS.root, Terms(quota_bytes=half))
    limits = {"budget": {"budget_bytes": budget}, "ttl": {"ttl_s": DAY_S // 4}, "quota": {}}[cause]
    caplog.clear()
    changed = options(durability="none", deletion_wait_s=60, **limits)
    with Engine.open(tmp_path / "data", changed, clock=clock, steady=clock) as engine:
        [warned] = [text for one in caplog.records if "about to" in (text := one.getMessage()) and "60 s" in text]
        assert f"({cause}) in 60 s, unless limits change" in warned
        clock.now_s += 50
        engine.maintain()
        assert all(find(engine, NS, prompt(number)).n_tokens == 300 for number in range(21))
        if cause == "budget":
            assert put(engine, NS, prompt(21)).reason is Reason.STORE_FULL
            assert "about to delete" in engine.degraded
        clock.now_s += 20
        engine.maintain()
        assert find(engine, NS, prompt(0)).n_tokens == 0
        assert find(engine, NS, prompt(20)).n_tokens == 300 and not engine.degraded
        assert engine.stats().evictions[cause][0] > 5
        require_sound(engine)


def test_other_limits_save_what_waits_and_a_confirmed_one_does_not(engine: Engine, clock: Clock) -> None:
    """As `kvstore set` does it, without and with --yes."""
    engine._shared.options = replace(engine._shared.options, deletion_wait_s=60)
    for number in range(10):
        put(engine, NS, prompt(number))
    half = engine.used_bytes - engine.stats().stored_bytes // 2
    engine.limit(half, 0)
    engine.limit(2 << 20, 0)
    clock.now_s += 100
    engine.maintain()
    assert all(find(engine, NS, prompt(number)).n_tokens == 300 for number in range(10))
    engine.limit(half, 0, at_once=True)
    assert engine.used_bytes <= half and find(engine, NS, prompt(9)).n_tokens == 300


def test_a_namespace_that_was_emptied_keeps_the_name_of_its_limits(tmp_path: Path, engine: Engine) -> None:
    """Over a restart, too; without limits it has none."""
    put(engine, NS, prompt(1))
    engine.keeper.change_terms(NS.root, Terms(quota_bytes=1))
    assert not engine.stats().namespaces and engine.keeper.named("weights") == [NS.root]
    engine.close()
    with Engine.open(tmp_path / "data", options()) as again:
        assert again.keeper.named("weights") == [NS.root] and not again.keeper.named("")
        again.keeper.change_terms(NS.root, Terms(quota_bytes=1 << 30))
        assert again.keeper.named("weights") == [NS.root]
        again.keeper.change_terms(NS.root, Terms())
        assert not again.keeper.named("weights")


def test_an_eviction_says_what_pins_kept(engine: Engine) -> None:
    """By size or age, also in a dry run; one by name ends them."""
    for number in range(3):
        put(engine, NS, prompt(number))
    kept = engine.keeper.pin(NS.root, [last_key(engine, prompt(1))])
    for dry_run in (True, False):
        report = engine.evict(Selection(bytes=1 << 30), dry_run)
        assert report.pinned_bytes == kept > 0 and report.blocks == 4
    assert engine.evict(Selection(all=True)).pinned_bytes == 0 == engine.stats().stored_bytes


def test_a_clock_that_goes_back_expires_nothing(engine: Engine, clock: Clock) -> None:
    """Ages are differences; one that is negative is no age."""
    put(engine, NS, prompt(1))
    engine.keeper.change_terms(NS.root, Terms(ttl_s=DAY_S))
    clock.now_s -= 400 * DAY_S
    engine.maintain()
    assert find(engine, NS, prompt(1)).n_tokens == 300


def test_a_checkpoint_that_is_pinned_is_not_thinned(tmp_path: Path) -> None:
    """A hybrid's prompt starts from its checkpoint, so the pin is worth nothing without it."""
    hybrid = namespace(layout=HYBRID)
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, hybrid, list(range(256 * 9)))
        put_checkpoint(engine, hybrid, list(range(600)))
        chain = Chain(hybrid.root, pack_tokens(list(range(600))))
        row = engine.checkpoint_at(chain)
        assert row is not None
        engine.keeper.pin(hybrid.root, [row.key])
        for length in (100, 700, 800, 1500, 1700, 1900, 2100, 2200, 2300):
            put_checkpoint(engine, hybrid, list(range(length)))
        assert engine.checkpoint_at(chain) is not None


def test_a_damaged_file_is_set_aside_and_the_store_opens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Pins are lost, which the log says; what is stored is not."""
    for damage in (b"", b"{", b'{"pins": [], "namespaces": {}}', b'{"pins": {"00": "11"}, "namespaces": {}}'):
        folder = tmp_path / str(len(damage))
        with Engine.open(folder, options()) as engine:
            put(engine, NS, prompt(1))
            engine.keeper.pin(NS.root, [last_key(engine, prompt(1))])
        (folder / "settings" / "keep.json").write_bytes(damage)
        with Engine.open(folder, options()) as engine:
            assert not engine.keeper.pins
            assert find(engine, NS, prompt(1)).n_tokens == 300
        assert (folder / "settings" / "keep.json.damaged").read_bytes() == damage
    assert "pins, quotas and TTLs are lost" in caplog.text


def test_what_is_not_stored_cannot_be_pinned_and_there_are_not_too_many(tmp_path: Path) -> None:
    """And a refused pin leaves no trace."""
    with Engine.open(tmp_path / "data", options()) as engine:
        with pytest.raises(NotFoundError):
            engine.keeper.pin(NS.root, [bytes(32)])
        put(engine, NS, prompt(1))
        key = last_key(engine, prompt(1))
        engine._shared.keep.add_pins(NS.root, [number.to_bytes(32, "big") for number in range(PINS_MAX)])
        engine.keeper.pin(NS.root, [key])  # pins of what is gone make room
        assert list(engine.keeper.pins) == [key]
        assert json.loads((tmp_path / "data" / "settings" / "keep.json").read_text())["pins"] == {
            key.hex(): NS.root.hex()
        }


class Retention(RuleBasedStateMachine):
    """Stores, fetches, pins, terms, budgets, clock jumps, restarts and kills in any order."""

    BUDGET_BYTES = 1 << 20

    @initialize(seed=st.integers(0, 1000))
    def begin(self, seed: int) -> None:
        """A new directory."""
        self.folder = Path(tempfile.mkdtemp())
        self.data_dir = self.folder / f"data{seed}"
        self.clock, self.steady = Clock(), Clock()
        self.budget_bytes = self.BUDGET_BYTES
        self.pinned: dict[int, list[bytes]] = {}
        self.open()

    def open(self) -> None:
        """The directory as it is."""
        self.engine = Engine.open(self.data_dir, self.options(), clock=self.clock, steady=self.steady)

    def options(self) -> EngineOptions:
        """Without syncs, which are not what this is about."""
        return options(budget_bytes=self.budget_bytes, durability="none")

    @rule(number=st.integers(0, 30), length=st.sampled_from([40, 256, 300, 600]))
    def store(self, number: int, length: int) -> None:
        """As much as finds room."""
        put(self.engine, NS, prompt(number, length))

    @rule(number=st.integers(0, 5), length=st.integers(20, 900))
    def store_hybrid(self, number: int, length: int) -> None:
        """With a checkpoint at its end."""
        tokens = prompt(number, length)
        self.engine.store(HYBRIDS.to_record(), [*sequence(HYBRIDS, tokens), checkpoint(HYBRIDS, tokens)])

    @rule(number=st.integers(0, 30))
    def fetch(self, number: int) -> None:
        """What is found is right, which `find` asserts."""
        self.engine.touch(find(self.engine, NS, prompt(number, 600)).slices)

    @rule(number=st.integers(0, 30))
    def pin(self, number: int) -> None:
        """What is stored of it."""
        match = self.engine.match(chain_of(prompt(number, 600)))
        if not match.n_tokens:
            return
        keys = [match.slices[-1].row.key]
        try:
            self.engine.keeper.pin(NS.root, keys)
        except LimitError:
            return
        self.pinned.setdefault(number, []).extend(keys)

    @rule(number=st.integers(0, 30))
    def unpin(self, number: int) -> None:
        """All of one prompt."""
        self.engine.keeper.unpin(self.pinned.pop(number, []))

    @rule(quota=st.sampled_from([0, 200_000, 600_000]), ttl=st.sampled_from([0, 3600, DAY_S]))
    def terms(self, quota: int, ttl: int) -> None:
        """New terms."""
        self.engine.keeper.change_terms(NS.root, Terms(quota, ttl))

    @rule(seconds=st.sampled_from([60, 4000, 2 * DAY_S, -5000]))
    def wait(self, seconds: int) -> None:
        """Time passes, or is set back."""
        self.clock.now_s += seconds
        self.steady.now_s += max(0, seconds)
        self.engine.maintain()

    @rule(days=st.sampled_from([-40, 40]))
    def jump(self, days: int) -> None:
        """A clock that is set ahead or back expires nothing."""
        self.engine.maintain()
        before = self.engine.stats().evictions.get("ttl")
        self.clock.now_s += days * DAY_S
        self.engine.maintain()
        assert self.engine.stats().evictions.get("ttl") == before

    @rule(budget=st.sampled_from([1 << 19, 1 << 20]))
    def limit(self, budget: int) -> None:
        """A pin that was accepted may keep more than a fifth of a smaller budget."""
        self.budget_bytes = budget
        self.engine.limit(budget, 0)

    @rule()
    def restart(self) -> None:
        """In order."""
        self.engine.close()
        self.open()

    @rule(lose_index=st.booleans())
    def kill(self, lose_index: bool) -> None:
        """The directory as SIGKILL leaves it, perhaps without its index."""
        before, self.data_dir = self.data_dir, self.data_dir.with_name(self.data_dir.name + "k")
        shutil.copytree(before, self.data_dir)
        self.engine.close()
        shutil.rmtree(before)
        if lose_index:
            (self.data_dir / "index" / "data.mdb").unlink()
        self.open()

    @invariant()
    def pins_hit_and_limits_hold(self) -> None:
        """Every pinned block is there with all before it; the directory costs what is counted, within the budget."""
        keys = [key for held in self.pinned.values() for key in held]
        assert set(keys) == set(self.engine.keeper.pins)
        for key in keys:
            (info,) = self.engine.show(key)
            while info.row.parent != NS.root:
                (info,) = self.engine.show(info.row.parent)
        rows = {info.row.key: info.row for info in self.engine.list_blocks(limit=1000)}
        assert all(row.parent == row.root or row.parent in rows for row in rows.values())
        assert self.engine.used_bytes == disk_usage(self.data_dir)
        assert self.engine.used_bytes <= self.budget_bytes

    def teardown(self) -> None:
        """Close and remove."""
        if hasattr(self, "engine"):
            require_sound(self.engine)
            for number, keys in self.pinned.items():
                found = {part.row.key for part in find(self.engine, NS, prompt(number, 600)).slices}
                assert found & set(keys)
            self.engine.close()
            shutil.rmtree(self.folder)


TestRetention = Retention.TestCase
TestRetention.settings = settings(max_examples=10, stateful_step_count=25, deadline=None)
