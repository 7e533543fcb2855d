"""What of a prompt is found in a remote store: never more than is there, never less, in few round trips."""

from __future__ import annotations

import hashlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.core.blocks import BLOCK_TOKENS, FIDELITY_EXACT, pack_tokens
from kvstore.core.breaker import Deadline
from kvstore.core.keys import Chain, Namespace, block_key, checkpoint_key
from kvstore.core.layers import LayerSpec, Layout, PartSpec
from kvstore.errors import DeadlineError, RemoteError
from kvstore.remote.finder import ABSENT_S, LISTED_PAGES_MAX, OTHERS_MAX, Absences, Finder, Reach
from kvstore.remote.object_names import IDENTITY, Naming, label_of, labels_from, parse_object_name
from kvstore.remote.object_store import PAGE_NAMES_MAX, Listed
from tests.support.memory_objects import MemoryStore

LAYOUT = Layout((LayerSpec(PartSpec(1, 8, "F32"), PartSpec(1, 8, "F32")),))
PLAIN = Naming(Namespace(weights=b"w", layout=LAYOUT).info)
SALTED = Naming(Namespace(weights=b"w", layout=LAYOUT, salt=b"tenant").info)
LABELS = ("b8", "exact")
ROUNDS_MAX = 3


def chain_of(n_tokens: int, naming: Naming = PLAIN, first: int = 0) -> Chain:
    """A prompt of so many tokens."""
    return Chain(naming.root, pack_tokens(range(first, first + n_tokens)))


def fill(store: MemoryStore, chain: Chain, depths: dict[int, list[str]], naming: Naming = PLAIN) -> None:
    """Full blocks at these depths, under these labels."""
    for depth, labels in depths.items():
        for label in labels:
            store.put(naming.name(chain.parent(depth), chain.key(depth), label), b"x" * (depth + 1))


def find(store: MemoryStore, chain: Chain, naming: Naming = PLAIN, **given: object) -> Reach:
    """With a finder that remembers nothing."""
    return Finder(store).find(chain, naming, LABELS, Deadline(60), **given)  # type: ignore[arg-type]


@given(
    count=st.integers(1, 256),
    first=st.integers(0, 40),
    present=st.one_of(
        st.sets(st.integers(0, 300)),
        st.builds(lambda end, holes: set(range(end)) - holes, st.integers(0, 300), st.sets(st.integers(0, 300))),
    ),
    twice=st.sets(st.integers(0, 300)),
    other=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_what_is_found_is_what_looking_at_every_block_finds(
    count: int, first: int, present: set[int], twice: set[int], other: bool
) -> None:
    """With holes anywhere, under either label, and after any block that is held already: in three round trips."""
    chain = chain_of((first + count) * BLOCK_TOKENS)
    store = MemoryStore()
    labels = {
        depth: [LABELS[other], *([LABELS[not other]] if depth in twice else [])]
        for depth in present
        if depth < chain.full
    }
    fill(store, chain, labels)
    reach = find(store, chain, first=first)
    end = next(depth for depth in range(first, chain.full + 1) if depth not in labels)
    assert [one.key for one in reach.blocks] == [chain.key(depth) for depth in range(first, end)]
    assert [one.label for one in reach.blocks] == [min(labels[depth], key=LABELS.index) for depth in range(first, end)]
    assert all(store.objects[one.name][0] == one.head for one in reach.blocks)
    assert reach.n_tokens == end * BLOCK_TOKENS
    assert store.rounds.count("head") <= ROUNDS_MAX
    assert store.rounds.count("names") <= 1


@pytest.mark.parametrize("held", [0, 1, 2, 200, 255, 256])
def test_a_prompt_of_256_blocks_takes_three_round_trips_and_one_listing(held: int) -> None:
    """And few more requests than there are blocks."""
    chain = chain_of(256 * BLOCK_TOKENS)
    store = MemoryStore()
    fill(store, chain, {depth: ["b8"] for depth in range(held)})
    assert find(store, chain).n_tokens == held * BLOCK_TOKENS
    assert store.rounds.count("head") <= ROUNDS_MAX
    assert store.rounds.count("names") == (held > 0)
    assert store.asked <= len(LABELS) * (held + 50)


@given(data=st.data(), naming=st.sampled_from([PLAIN, SALTED]))
@settings(max_examples=60, deadline=None)
def test_tails_and_checkpoints_of_the_prompt_are_found_below_the_last_full_block(
    data: st.DataObject, naming: Naming
) -> None:
    """The longest tail, the checkpoints that it reaches; nothing of other prompts, however they are named."""
    full, extra = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 255))
    chain = chain_of(full * BLOCK_TOKENS + extra, naming)
    parent, rest = chain.parent(full), chain.tail
    store = MemoryStore()
    fill(store, chain, {depth: ["b8"] for depth in range(full)}, naming)
    tails = data.draw(st.sets(st.integers(1, 255), max_size=5))
    marks = data.draw(st.sets(st.integers(0, 255), max_size=5))
    for length in tails:
        tokens = rest[: 8 * length] if length <= extra else pack_tokens(range(9000, 9000 + length))
        store.put(naming.name(parent, block_key(parent, tokens), "exact"), b"tail")
    for length in marks:
        tokens = rest[: 8 * length] if length <= extra else pack_tokens(range(9000, 9000 + length))
        store.put(naming.name(parent, checkpoint_key(parent, tokens), "b8"), b"mark")
    store.put(naming.name(parent, b"\7" * 32, "b3"), b"of a rank that was not asked for")
    reach = find(store, chain, naming)
    longest = max((one for one in tails if one <= extra), default=0)
    assert reach.n_tokens == full * BLOCK_TOKENS + longest
    assert [one.end for one in reach.checkpoints] == sorted(
        (full * BLOCK_TOKENS + one for one in marks if one <= longest), reverse=True
    )
    assert all(one.is_checkpoint for one in reach.checkpoints)
    assert not any(one.is_checkpoint for one in reach.blocks)


def test_a_checkpoint_before_the_last_block_is_looked_for_where_one_is_needed() -> None:
    """A few listings further back, and not at all for those who need none."""
    chain = chain_of(8 * BLOCK_TOKENS)
    store = MemoryStore()
    fill(store, chain, {depth: ["b8"] for depth in range(8)})
    parent, inside = chain.parent(5), chain.tokens[5 * 2048 : 5 * 2048 + 80]
    store.put(PLAIN.name(parent, checkpoint_key(parent, b""), "b8"), b"mark")
    store.put(PLAIN.name(parent, checkpoint_key(parent, inside), "b8"), b"mark")
    assert find(store, chain).checkpoints == ()
    reach = find(store, chain, needs_checkpoint=True)
    assert [one.end for one in reach.checkpoints] == [5 * BLOCK_TOKENS + 10, 5 * BLOCK_TOKENS]


def test_what_was_absent_is_not_asked_for_again_for_a_minute() -> None:
    """Then it is. What was written by ourselves is asked for at once."""
    now = [0.0]
    chain = chain_of(16 * BLOCK_TOKENS)
    store = MemoryStore()
    finder = Finder(store, Absences(clock=lambda: now[0]))
    assert not finder.find(chain, PLAIN, LABELS, Deadline(60)).blocks
    asked = len(store.rounds)
    assert not finder.find(chain, PLAIN, LABELS, Deadline(60)).blocks
    assert len(store.rounds) == asked
    fill(store, chain, {0: ["b8"], 1: ["b8"]})
    now[0] = ABSENT_S - 1
    assert not finder.find(chain, PLAIN, LABELS, Deadline(60)).blocks
    finder.absences.forget([PLAIN.name(chain.root, chain.key(0), "b8")])
    assert len(finder.find(chain, PLAIN, LABELS, Deadline(60)).blocks) == 1
    now[0] = ABSENT_S + 1
    assert len(finder.find(chain, PLAIN, LABELS, Deadline(60)).blocks) == 2


def test_what_was_there_is_asked_for_every_time() -> None:
    """Or a hit would outlive what it names."""
    chain = chain_of(4 * BLOCK_TOKENS)
    store = MemoryStore()
    fill(store, chain, {depth: ["b8"] for depth in range(4)})
    finder = Finder(store)
    assert len(finder.find(chain, PLAIN, LABELS, Deadline(60)).blocks) == 4
    store.delete([PLAIN.name(chain.parent(2), chain.key(2), "b8")], Deadline(60))
    assert len(finder.find(chain, PLAIN, LABELS, Deadline(60)).blocks) == 2


def test_absences_are_bounded() -> None:
    """The oldest are forgotten."""
    absences = Absences(count_max=10)
    absences.note(str(one) for one in range(25))
    assert len(absences) == 10
    assert absences.unknown(["0", "14", "15", "24"]) == ["0", "14"]


def crowd(store: MemoryStore, chain: Chain, count: int) -> None:
    """Objects of so many other continuations after the first block of a chain."""
    for number in range(count):
        key = block_key(chain.key(0), pack_tokens([90_000 + number]))
        store.put(PLAIN.name(chain.key(0), key, "b8"), b"x")


def test_a_tail_among_thousands_of_others_is_found() -> None:
    """Its name stands on any page of the listing, within a bound."""
    chain = chain_of(BLOCK_TOKENS + 200)
    store = MemoryStore()
    fill(store, chain, {0: ["b8"]})
    tail = block_key(chain.key(0), chain.tokens[BLOCK_TOKENS * 8 :])
    store.put(PLAIN.name(chain.key(0), tail, "b8"), b"xx")
    crowd(store, chain, (LISTED_PAGES_MAX - 1) * PAGE_NAMES_MAX)
    reach = find(store, chain)
    assert reach.n_tokens == BLOCK_TOKENS + 200
    assert store.rounds.count("names") == LISTED_PAGES_MAX
    crowd(store, chain, LISTED_PAGES_MAX * PAGE_NAMES_MAX)
    store.rounds.clear()
    find(store, chain)
    assert store.rounds.count("names") == LISTED_PAGES_MAX


def test_what_comes_of_a_listing_is_used_though_its_next_page_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Late or refused: the blocks that were seen are there."""
    chain = chain_of(BLOCK_TOKENS + 200)
    store = MemoryStore()
    fill(store, chain, {0: ["b8"]})
    crowd(store, chain, PAGE_NAMES_MAX + 1)
    names = store.names
    for error in (DeadlineError("late"), RemoteError("refused")):

        def first_page(prefix: str, after: str, deadline: Deadline, error: Exception = error) -> list[Listed]:
            if after:
                raise error
            return names(prefix, after, deadline)

        monkeypatch.setattr(store, "names", first_page)
        reach = find(store, chain)
        assert (reach.n_tokens, len(reach.others)) == (BLOCK_TOKENS, OTHERS_MAX)


def test_a_store_that_is_late_is_a_deadline() -> None:
    """The caller decides what that is worth."""
    store = MemoryStore()
    store.delay_s = 0.2
    with pytest.raises(DeadlineError):
        Finder(store).find(chain_of(2560), PLAIN, LABELS, Deadline(0.05))


def test_a_listing_of_a_tenant_shows_nothing_that_follows_from_tokens() -> None:
    """Neither its root, nor any key or hash that can be made from tokens without the salt."""
    chain, plain = chain_of(4 * BLOCK_TOKENS, SALTED), chain_of(4 * BLOCK_TOKENS, PLAIN)
    shown = {
        part
        for depth in range(4)
        for part in re.split(r"[/.]", SALTED.name(chain.parent(depth), chain.key(depth), "exact"))
    } | {SALTED.folder}
    guesses = [key for one in (chain, plain) for key in [one.root, *one.keys()]]
    hashed = {text for key in guesses for text in (key.hex(), hashlib.sha256(key).hexdigest())}
    assert not shown & hashed
    assert SALTED.identity_name == f"{SALTED.folder}/{IDENTITY}"
    assert SALTED.root.hex() not in SALTED.identity().decode()
    assert PLAIN.root.hex() in PLAIN.identity().decode()


def test_names_are_read_back_and_foreign_ones_are_not() -> None:
    """Eviction and check know by them what hangs on what."""
    chain = chain_of(2 * BLOCK_TOKENS)
    name = PLAIN.name(chain.parent(1), chain.key(1), "b8")
    parts = parse_object_name(name)
    assert parts == (chain.root.hex(), chain.key(0).hex(), chain.key(1).hex(), "b8")
    for foreign in (
        name + "x",
        name.replace("/", "//"),
        PLAIN.identity_name,
        "x/" + name,
        name[:64] + "/zz" + name[67:],
    ):
        assert parse_object_name(foreign) is None


def test_labels_begin_with_what_the_session_stores() -> None:
    """Then what is at least as good; never what is worse than it takes."""
    assert label_of(FIDELITY_EXACT) == "exact"
    assert label_of(850) == "b8"
    assert labels_from(850) == ("b8", "exact")
    assert labels_from(FIDELITY_EXACT) == ("exact",)
    assert labels_from(0, first=650) == ("b6", "exact", "b8", "b4", "b3")
    assert labels_from(450) == ("b4", "exact", "b8", "b6")
