"""What the daemon remembers of requests: where they part from what is stored, why, and nothing for too long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvstore.core.blocks import Reason, pack_tokens, unpack_tokens
from kvstore.core.causes import WORDS, Cause
from kvstore.core.keys import Chain, Namespace
from kvstore.core.layers import LayerSpec, Layout, PartSpec
from kvstore.engine import Engine, Selection
from kvstore.errors import CorruptDataError
from kvstore.telemetry.requests import Asked
from kvstore.telemetry.traffic import Who
from kvstore.telemetry.why import (
    ENTRIES_MAX,
    OTHERS_ASKED_MAX,
    UNSTORED_MAX,
    NamespaceIdentity,
    RequestEntry,
    StoreEnd,
    Why,
)
from tests.support.engine import HYBRID, LAYOUT, checkpoint, namespace, options, put, sequence

TOKENS = list(range(1000, 1700))
NS = namespace("small-lm")
OTHER_LAYOUT = Layout((LayerSpec(PartSpec(1, 4, "F32"), PartSpec(1, 4, "F32")),) * 2)


def changed(at: int, *instead: int) -> list[int]:
    """The prompt with other tokens in the place of one."""
    return [*TOKENS[:at], *(instead or (1,)), *TOKENS[at + 1 :]]


class Rig:
    """An engine, and what is remembered of requests to it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.why = Why(engine.nearest)
        self._number = 0

    def ask(
        self, tokens: list[int], ns: Namespace = NS, *, name: str = "", limit: int | None = None, **how: Any
    ) -> RequestEntry:
        """A request, and what is remembered of it."""
        self._number += 1
        chain = Chain(ns.root, pack_tokens(tokens))
        match = self.engine.match(chain, how.pop("fidelity_min", 0), limit or len(tokens) - 1, **how)
        asked = Asked(Who("worker", 7, ns.root, ns.alias, ns.engine), name or f"{self._number:06x}", len(tokens))
        self.why.note(asked, chain, match, identity_of(ns))
        return self.why.last(1)[0]

    def ended(self, tokens: list[int], stored: int, reason: Reason, new_bytes: int = 0, ns: Namespace = NS) -> None:
        """A store has ended."""
        chain = Chain(ns.root, pack_tokens(tokens))
        self.why.stored(chain, StoreEnd(len(tokens), stored, new_bytes, reason), private=bool(ns.salt))


def identity_of(ns: Namespace) -> NamespaceIdentity:
    """As a request names it."""
    digest = ns.layout.digest
    return NamespaceIdentity(ns.root, ns.weights, ns.adapter, digest, ns.dtype, ns.engine, bool(ns.salt), ns.alias)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """TOKENS are stored: two blocks and a tail."""
    with Engine.open(tmp_path, options()) as engine:
        put(engine, NS, TOKENS)
        yield Rig(engine)


@pytest.mark.parametrize("at", [1, 40, 255, 256, 257, 300, 511, 512, 690])
def test_a_prompt_that_changed_shows_twelve_tokens_on_each_side(rig: Rig, at: int) -> None:
    """Wherever in a block, at its edges too."""
    entry = rig.ask(changed(at))
    assert (entry.cause, entry.common_tokens, entry.given_tokens) == (Cause.CHANGED, at, at)
    assert unpack_tokens(entry.before) == TOKENS[max(0, at - 12) : at]
    assert unpack_tokens(entry.after) == changed(at)[at : at + 12]
    assert unpack_tokens(entry.stored) == TOKENS[at : at + 12]


def test_a_prompt_that_goes_on_after_what_is_stored_was_never_stored(rig: Rig) -> None:
    """The stored chain ends there; nothing of it differs. Nothing shared at all is the same."""
    entry = rig.ask([*TOKENS, *range(50)])
    assert (entry.cause, entry.common_tokens, entry.stored) == (Cause.NEVER_STORED, 700, b"")
    assert rig.ask(list(range(600))).cause is Cause.NEVER_STORED


def test_a_prompt_that_is_all_there_is_whole(rig: Rig) -> None:
    """All but the last token, which an engine computes."""
    entry = rig.ask(TOKENS)
    assert (entry.cause, entry.common_tokens, entry.reason) == (Cause.WHOLE, 699, Reason.OK)


def test_a_worker_that_has_in_memory_what_is_stored_is_not_told_that_restoring_was_too_slow(rig: Rig) -> None:
    """Nothing was to be restored. Where its memory holds less, the reason stands."""
    for tokens, covered, cause, reason, given in (
        (changed(300), 300, Cause.CHANGED, Reason.UNKNOWN_PREFIX, 300),
        (changed(300), 299, Cause.LIMITED, Reason.SLOWER_THAN_PREFILL, 0),
        (TOKENS, 699, Cause.WHOLE, Reason.OK, 699),
        (TOKENS, 698, Cause.LIMITED, Reason.SLOWER_THAN_PREFILL, 0),
    ):
        chain = Chain(NS.root, pack_tokens(tokens))
        slow = replace(rig.engine.match(chain, 0, 699), n_tokens=0, reason=Reason.SLOWER_THAN_PREFILL)
        asked = Asked(Who("worker", 7, NS.root, NS.alias, NS.engine), f"{covered}", 700, covered)
        rig.why.note(asked, chain, slow, identity_of(NS))
        entry = rig.why.last(1)[0]
        assert (entry.cause, entry.reason, entry.given_tokens) == (cause, reason, given)


def test_what_was_evicted_is_not_what_was_never_stored(rig: Rig) -> None:
    """By hashes; the note of a request that met it goes with it."""
    rig.ask(changed(600))
    rig.engine.evict(Selection(all=True))
    rig.why.forget()
    assert rig.why.last(9) == []
    entry = rig.ask(TOKENS)
    assert (entry.cause, entry.reason) == (Cause.EVICTED, Reason.EVICTED)
    rig.why.forget()
    assert rig.why.last(9) == [entry]  # of after the eviction


def test_an_eviction_of_one_prompt_drops_what_was_noted_of_it_alone(rig: Rig) -> None:
    """Of the prompt that parted from it, and of the one that was stored under it."""
    mine = changed(600)
    rig.ask(mine, name="parted")
    put(rig.engine, NS, list(range(5000, 5600)))
    rig.ask([*range(5000, 5500), 1, 2, 3], name="other")
    tail = rig.engine.match(Chain(NS.root, pack_tokens(TOKENS))).rows[-1][0]
    rig.engine.evict(Selection(key_prefix=tail))
    rig.why.forget()
    assert [one.asked.request_id for one in rig.why.last(9)] == ["other"]


def test_a_note_goes_where_it_is_no_longer_known_what_was_evicted_since(tmp_path: Path) -> None:
    """The table of evicted blocks is bounded: rather a note less than the tokens of what a user had evicted."""
    with Engine.open(tmp_path, options(evicted_max=2)) as engine:
        rig = Rig(engine)
        for first in (0, 5000, 6000):
            put(engine, NS, list(range(first, first + 200)))
        rig.ask([*range(100), 7, 8])
        for first in (0, 5000, 6000):
            row = engine.match(Chain(NS.root, pack_tokens(range(first, first + 200)))).rows[0][0]
            engine.evict(Selection(key_prefix=row))
        rig.why.forget()
        assert rig.why.last(9) == []


def test_an_eviction_of_a_prompts_own_chain_drops_its_note(rig: Rig) -> None:
    """The tokens that it asked for were stored afterwards, and then evicted."""
    own = list(range(9000, 9600))
    entry = rig.ask(own)
    assert entry.common_tokens == 0
    put(rig.engine, NS, [*own, 1, 2, 3])
    top = rig.engine.match(Chain(NS.root, pack_tokens(own))).rows[0][0]
    rig.engine.evict(Selection(key_prefix=top))
    rig.why.forget()
    assert rig.why.last(9) == []


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"weights": b"finetuned"}, "model weights"),
        ({"adapter": b"lora"}, "adapter"),
        ({"layout": OTHER_LAYOUT}, "layout"),
        ({"dtype": "BF16"}, "dtype"),
        ({"engine": "test 2"}, "engine"),
        ({"weights": b"w2", "engine": "test 2"}, "model weights, engine"),
    ],
)
def test_what_is_stored_for_another_identity_names_the_field(rig: Rig, changes: dict[str, Any], field: str) -> None:
    """While a request waits, and for a prompt that an admin asks about."""
    fields = {"weights": NS.weights, "layout": LAYOUT, "dtype": "F32", "engine": "test 1", "alias": "small-lm"}
    other = Namespace(**{**fields, **changes})
    entry = rig.ask(TOKENS, other)
    assert entry.cause is Cause.IDENTITY and entry.other is not None
    assert (entry.other.field, entry.other.root, entry.other.n_tokens) == (field, NS.root, 256)
    chain = Chain(other.root, pack_tokens(TOKENS))
    whole = rig.why.explained(entry.asked, chain, rig.engine.match(chain), identity_of(other), OTHERS_ASKED_MAX)
    assert whole.other is not None and whole.other.n_tokens == 699


def test_another_profile_is_another_identity(rig: Rig) -> None:
    """Stored at less than the session takes."""
    put(rig.engine, NS, list(range(3000, 3600)), fidelity=400)
    entry = rig.ask(list(range(3000, 3600)), fidelity_min=800)
    assert entry.cause is Cause.IDENTITY and entry.other is not None and entry.other.field == "profile"


def test_another_salt_is_named_without_a_look_at_what_is_stored_under_it(tmp_path: Path) -> None:
    """An admin who could ask for prompts would learn what tenants say."""
    tenant = Namespace(NS.weights, LAYOUT, dtype="F32", engine="test 1", salt=b"tenant", alias="small-lm")
    with Engine.open(tmp_path, options()) as engine:
        rig = Rig(engine)
        put(engine, tenant, TOKENS)
        for prompt in (TOKENS, list(range(700))):
            entry = rig.ask(prompt)
            assert entry.cause is Cause.IDENTITY and entry.other is not None
            assert (entry.other.field, entry.other.n_tokens) == ("salt", 0)


def test_a_missing_checkpoint_is_not_the_cause_where_the_prompt_changed(tmp_path: Path) -> None:
    """It says how much could be used; where everything is shared it is the cause."""
    hybrid = namespace("hybrid", HYBRID)
    with Engine.open(tmp_path, options()) as engine:
        rig = Rig(engine)
        engine.store(hybrid.to_record(), [*sequence(hybrid, TOKENS), checkpoint(hybrid, TOKENS)])
        entry = rig.ask(changed(300), hybrid, exact=True)
        assert (entry.cause, entry.reason, entry.common_tokens) == (Cause.CHANGED, Reason.NO_CHECKPOINT, 300)
        entry = rig.ask(TOKENS[:500], hybrid, exact=True)
        assert (entry.cause, entry.reason, entry.common_tokens) == (Cause.LIMITED, Reason.NO_CHECKPOINT, 499)


def test_tenants_and_what_is_encrypted_leave_nothing_behind(tmp_path: Path) -> None:
    """But a count."""
    tenant = Namespace(NS.weights, LAYOUT, dtype="F32", engine="test 1", salt=b"tenant", alias="small-lm")
    with Engine.open(tmp_path / "data", options(master_key=bytes(32), keys_dir=tmp_path / "keys")) as engine:
        rig = Rig(engine)
        put(engine, tenant, TOKENS)
        key = engine.encrypt(NS.root)
        engine.store(NS.to_record(), sequence(NS, TOKENS), encryption=key)
        for ns in (tenant, NS):
            with pytest.raises(IndexError):
                rig.ask(changed(40), ns)
            rig.ended(TOKENS, 0, Reason.STORE_FULL, ns=tenant)
        assert rig.why.not_kept == 2
        assert rig.why.last(9) == [] and not rig.why.identities() and not rig.why._unstored
        everything = Why(engine.nearest, keeps=False)
        everything.note(
            Asked(Who("w", 1, bytes(32), "m", "e"), "1", 9),
            Chain(bytes(32), bytes(72)),
            engine.match(Chain(bytes(32), bytes(72))),
            identity_of(NS),
        )
        assert everything.not_kept == 1 and not everything.last(9)


@pytest.mark.parametrize("late_at", [1, 2], ids=["before it is looked at", "while it is looked at"])
def test_a_request_that_is_noted_too_late_is_counted_and_not_kept(rig: Rig, late_at: int) -> None:
    """What a store has brought since would be told as what was there."""
    put(rig.engine, NS, TOKENS)
    chain = Chain(NS.root, pack_tokens(changed(40)))
    match = rig.engine.match(chain, 0, len(TOKENS) - 1)
    asked = Asked(Who("worker", 7, NS.root, NS.alias, NS.engine), "1", len(TOKENS))
    looks = iter([*[False] * (late_at - 1), True])
    rig.why.note(asked, chain, match, identity_of(NS), None, "", lambda: next(looks))
    assert rig.why.not_kept == 1 and not rig.why.last(9) and not rig.why.places.reported()


def test_the_end_of_its_store_is_told_with_a_request(rig: Rig) -> None:
    """Whatever was generated after the prompt; another prompt's store is not taken for it."""
    rig.ask(changed(40, 5), name="first")
    rig.ask(changed(40, 6), name="second")
    rig.ended([*changed(40, 5), 1, 2, 3], 703, Reason.OK, 4096)
    second, first = rig.why.last(2)
    assert second.store is None
    assert first.store == StoreEnd(703, 703, 4096, Reason.OK)


def test_a_store_that_was_refused_or_cut_is_the_cause_of_the_next_miss(rig: Rig) -> None:
    """With the reason of the store; another prompt is not concerned."""
    long = [*TOKENS, *range(200)]
    rig.ended(long, 700, Reason.STORE_FULL)
    entry = rig.ask(long)
    assert (entry.cause, entry.unstored) == (Cause.REFUSED, Reason.STORE_FULL)
    rig.ended(long, 700, Reason.DEPENDENCY_LOST, 4096)
    entry = rig.ask(long)
    assert (entry.cause, entry.unstored) == (Cause.CUT, Reason.DEPENDENCY_LOST)
    assert rig.ask([*TOKENS, 9, 9, 9]).cause is Cause.NEVER_STORED
    rig.ended(list(range(600)), 600, Reason.ALREADY_STORED)
    rig.ended(list(range(20)), 0, Reason.BELOW_THRESHOLD)
    assert len(rig.why._unstored) == 1


def test_a_match_and_its_fetch_are_one_request(rig: Rig) -> None:
    """And of two layouts of one model the one that has more is told."""
    rig.ask(changed(40), name="3f2a1c")
    rig.ask(changed(40), name="3f2a1c")
    other = namespace("small-lm", OTHER_LAYOUT)
    rig.ask(changed(40), other, name="3f2a1c")
    (entry,) = rig.why.last(9)
    assert (entry.root, entry.common_tokens) == (NS.root, 40)


def test_a_damaged_index_costs_the_note_and_nothing_else(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request itself is answered."""

    def damaged(*_: object) -> bytes:
        raise CorruptDataError("index row: too short")

    monkeypatch.setattr(rig.engine.nearest, "after", damaged)
    with pytest.raises(IndexError):  # nothing is remembered
        rig.ask(changed(40))


def test_what_is_remembered_is_bounded(rig: Rig) -> None:
    """256 requests, some thousand hashes."""
    for number in range(ENTRIES_MAX + 20):
        rig.ask(changed(40, number))
    for number in range(UNSTORED_MAX + 20):
        rig.ended([number, *range(40)], 0, Reason.STORE_FULL)
    assert len(rig.why.last(1 << 20)) == ENTRIES_MAX
    assert len(rig.why._unstored) == UNSTORED_MAX


def test_the_chain_around_a_place_is_read_back_from_the_index(rig: Rig) -> None:
    """For the region: all common tokens; and more than 12 of both sides while they are stored."""
    mine = changed(300)
    entry = rig.ask(mine)
    nearest = rig.engine.nearest
    assert unpack_tokens(nearest.upto(entry.nearest, 300)) == TOKENS[:300]
    assert unpack_tokens(nearest.after(NS.root, entry.nearest, 300, 250)) == TOKENS[300:550]
    head = pack_tokens(mine[256:312])
    assert nearest.follow(NS.root, entry.parent, head, 100) == b""
    put(rig.engine, NS, mine)
    assert unpack_tokens(nearest.follow(NS.root, entry.parent, head, 300)) == mine[312:612]
    rig.engine.evict(Selection(all=True))
    assert nearest.upto(entry.nearest, 300) == nearest.after(NS.root, entry.nearest, 300, 9) == b""


def test_every_cause_has_words() -> None:
    """Also the one that no daemon gives yet."""
    assert WORDS.keys() == set(Cause)
