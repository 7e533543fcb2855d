"""Eviction from a remote store, and its check: leaves first, and nothing is called sound that is not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.core.blocks import BLOCK_TOKENS
from kvstore.core.breaker import Deadline
from kvstore.core.keys import Namespace
from kvstore.errors import InvalidRequestError, RemoteError
from kvstore.remote.check import check_remote
from kvstore.remote.evict import LEFTOVER_S, evict_remote
from kvstore.remote.object_names import Naming, parse_object_name
from kvstore.remote.object_store import MARKER, PAGE_NAMES_MAX
from tests.support.engine import LAYOUT
from tests.support.memory_objects import MemoryStore
from tests.support.remote_blobs import NS, blobs_of, fill, name_of

ROOT = "f" * 64
NOW_S = 1_000_000.0


def node(number: int) -> str:
    """A key, in hex."""
    return f"{number:064x}"


def put_tree(store: MemoryStore, parents: Sequence[int], ages_s: Sequence[float], labels: Sequence[int]) -> None:
    """Objects 1, 2, 3 .., each below one that came before or at the root (0), of 100 bytes and these ages."""
    for number, (parent, age_s, both) in enumerate(zip(parents, ages_s, labels, strict=True), start=1):
        above = node(parent) if parent else ROOT
        for label in ("exact", "b8")[: 1 + both]:
            store.put(f"{ROOT}/{above[:2]}/{above}/{node(number)}.{label}", b"x" * 100, NOW_S - age_s)


def left(store: MemoryStore) -> set[int]:
    """Numbers of the objects that are there."""
    return {int(name.key, 16) for one in store.objects if (name := parse_object_name(one)) is not None}


TREES = st.integers(1, 40).flatmap(
    lambda count: st.tuples(
        st.tuples(*(st.integers(0, number) for number in range(count))),
        st.lists(st.floats(0, 1000), min_size=count, max_size=count),
        st.lists(st.integers(0, 1), min_size=count, max_size=count),
    )
)


@given(tree=TREES, older_s=st.none() | st.floats(0, 1000), bytes_max=st.none() | st.integers(0, 5000))
@settings(max_examples=100, deadline=None)
def test_what_is_left_hangs_together_whatever_the_rule(
    tree: tuple[Sequence[int], Sequence[float], Sequence[int]], older_s: float | None, bytes_max: int | None
) -> None:
    """Nothing is left without its parent; nothing is left that should go, nor gone that should be left."""
    parents, ages_s, labels = tree
    store = MemoryStore()
    put_tree(store, parents, ages_s, labels)
    if older_s is None and bytes_max is None:
        with pytest.raises(InvalidRequestError):
            evict_remote(store)
        return
    before = dict(store.objects)
    tried = evict_remote(store, older_s=older_s, bytes_max=bytes_max, dry_run=True, clock=lambda: NOW_S)
    assert store.objects == before
    done = evict_remote(store, older_s=older_s, bytes_max=bytes_max, clock=lambda: NOW_S)
    assert (done.objects, done.nbytes) == (tried.objects, tried.nbytes)
    there = left(store)
    assert all(parents[number - 1] in {0, *there} for number in there)
    nbytes = 100 * (len(store.objects) - 1)
    assert (done.left_bytes, done.left_objects) == (nbytes, len(store.objects) - 1)
    youngest = dict(enumerate(ages_s, start=1))
    for number in range(len(parents), 0, -1):
        if parents[number - 1]:
            youngest[parents[number - 1]] = min(youngest[parents[number - 1]], youngest[number])
    if bytes_max is None and older_s is not None:
        assert there == {number for number, age_s in youngest.items() if NOW_S - age_s > NOW_S - older_s}
    if bytes_max is not None:
        assert nbytes <= bytes_max
        if older_s is None and done.objects:
            assert nbytes > bytes_max - 200


def test_an_eviction_that_is_killed_leaves_what_hangs_together() -> None:
    """Leaves go first, page by page."""
    count = PAGE_NAMES_MAX + 50
    store = MemoryStore()
    put_tree(store, range(count), [10.0] * count, [0] * count)
    delete = store.delete

    def killed(names: Sequence[str], deadline: Deadline) -> None:
        if len(names) < PAGE_NAMES_MAX:
            raise RemoteError("gone")
        delete(names, deadline)

    store.delete = killed  # type: ignore[method-assign]
    with pytest.raises(RemoteError):
        evict_remote(store, older_s=1, clock=lambda: NOW_S)
    assert left(store) == set(range(1, 51))


def test_names_that_lead_in_a_circle_are_evicted_like_others() -> None:
    """Somebody made them up."""
    store = MemoryStore()
    for one, other in ((1, 2), (2, 3), (3, 1), (4, 4)):
        store.put(f"{ROOT}/{node(other)[:2]}/{node(other)}/{node(one)}.exact", b"x", NOW_S - 50)
    assert evict_remote(store, older_s=10, clock=lambda: NOW_S).objects == 4
    assert left(store) == set()


def test_identities_probes_and_foreign_objects_outlive_blocks_as_they_should() -> None:
    """The identity of a namespace that is empty goes when it is old; what is not ours stays."""
    store = MemoryStore()
    put_tree(store, [0], [2 * LEFTOVER_S], [0])
    store.put(f"{ROOT}/identity.json", b"{}", NOW_S - 2 * LEFTOVER_S)
    store.put(f"{node(5)}/identity.json", b"{}", NOW_S - 5)
    store.put("probe/0123", b"first", NOW_S - 2 * LEFTOVER_S)
    store.put("holiday/photo.jpg", b"jpg", NOW_S - 2 * LEFTOVER_S)
    assert evict_remote(store, older_s=LEFTOVER_S, clock=lambda: NOW_S).leftovers == 2
    assert set(store.objects) == {MARKER, f"{node(5)}/identity.json", "holiday/photo.jpg"}


def test_nothing_is_evicted_from_a_place_without_a_marker() -> None:
    """It is not a remote store."""
    store = MemoryStore(marked=False)
    put_tree(store, [0], [50.0], [0])
    with pytest.raises(RemoteError, match="remote-init"):
        evict_remote(store, older_s=1, clock=lambda: NOW_S)
    with pytest.raises(RemoteError, match="remote-init"):
        check_remote(store)
    assert left(store) == {1}


BLOBS = blobs_of(3 * BLOCK_TOKENS + 40)


def test_a_store_of_sound_objects_is_clean() -> None:
    """Of models and of tenants, with their identities."""
    store = MemoryStore()
    tenant = Namespace(weights=b"weights", layout=LAYOUT, dtype="F32", engine="test 1", salt=b"tenant")
    for ns in (NS, tenant):
        fill(store, blobs_of(600, ns), ns)
        store.put(Naming(ns.info).identity_name, Naming(ns.info).identity())
    store.put("probe/0123", b"first")
    report = check_remote(store)
    assert not report.findings
    assert (report.objects, report.holes, report.leftovers) == (6, 0, 1)


@given(which=st.integers(0, 3), at=st.floats(0, 1, exclude_max=True), patch=st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_a_changed_byte_anywhere_is_found(which: int, at: float, patch: int) -> None:
    """And named. What hangs on it is not damaged."""
    store = MemoryStore()
    fill(store, BLOBS)
    block, blob = BLOBS[which]
    place = int(at * len(blob))
    store.put(name_of(block), blob[:place] + bytes([blob[place] ^ patch]) + blob[place + 1 :])
    report = check_remote(store)
    assert [(one.kind, one.name) for one in report.findings] == [("corrupt", name_of(block))]
    assert report.objects == 3


def test_a_sound_blob_under_a_wrong_name_and_foreign_names_are_found() -> None:
    """Names are what is trusted to look; a hole is no damage."""
    store = MemoryStore()
    fill(store, [BLOBS[0], BLOBS[2], BLOBS[3]])
    store.put(name_of(BLOBS[1][0]).replace(".exact", ".b8"), BLOBS[1][1])
    store.put("holiday/photo.jpg", b"jpg")
    report = check_remote(store)
    assert sorted(one.kind for one in report.findings) == ["corrupt", "foreign"]
    assert (report.objects, report.holes) == (3, 1)


def test_an_object_that_went_while_it_was_checked_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others evict meanwhile. One that cannot be read is."""
    store = MemoryStore()
    fill(store, BLOBS)
    names = store.names

    def then_evicted(prefix: str, after: str, deadline: Deadline) -> list[object]:
        page = names(prefix, after, deadline)
        store.objects.pop(name_of(BLOBS[3][0]), None)
        return list(page)

    monkeypatch.setattr(store, "names", then_evicted)
    assert not check_remote(store).findings
    monkeypatch.setattr(store, "_read", lambda *given: (_ for _ in ()).throw(RemoteError("500")))
    assert {one.kind for one in check_remote(store).findings} == {"unreadable"}
