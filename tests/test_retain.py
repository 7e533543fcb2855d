"""The table of blobs against plain Python: what is counted, what is chosen, what survives saving."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.engine.retain import reachable_bytes, tree, victims, where
from kvstore.errors import CorruptDataError
from kvstore.index.table import CHECKPOINT, CHUNK, PINNED, Table, Usage


@dataclass
class Node:
    """A blob of the model."""

    key: bytes
    parent: Node | None
    namespace: int
    nbytes: int
    n_tokens: int
    flags: int
    last_use: int = 0
    used_s: int = 0
    children: list[Node] = field(default_factory=list)

    @property
    def depth(self) -> int:
        """Blocks before it."""
        return 0 if self.parent is None else self.parent.depth + 1


class Model:
    """A table and the same again as objects."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.table = Table()
        self.nodes: dict[bytes, Node] = {}

    def add(self) -> None:
        """A block or a checkpoint after any block."""
        parents = [node for node in self.nodes.values() if not node.flags & CHECKPOINT]
        parent = self.random.choice([None, *parents])
        flags = CHECKPOINT if parent is not None and self.random.random() < 0.2 else 0
        namespace = parent.namespace if parent else self.random.randrange(3)
        node = Node(self.random.randbytes(32), parent, namespace, self.random.randrange(1, 9), 7, flags)
        self.table.add(
            node.key,
            parent.key if parent else None,
            namespace,
            depth=node.depth,
            nbytes=node.nbytes,
            n_tokens=node.n_tokens,
            flags=flags,
        )
        node.last_use = self.table.sequence
        self.nodes[node.key] = node
        if parent:
            parent.children.append(node)

    def remove(self) -> None:
        """Any leaf."""
        leaves = [node for node in self.nodes.values() if not node.children]
        if leaves:
            self.drop(self.random.choice(leaves))

    def drop(self, node: Node) -> None:
        """This leaf."""
        self.table.remove(node.key)
        del self.nodes[node.key]
        if node.parent:
            node.parent.children.remove(node)

    def touch(self) -> None:
        """A blob and all before it."""
        if not self.nodes:
            return
        node: Node | None = self.random.choice(list(self.nodes.values()))
        used_s, chain = self.random.randrange(1000), []
        while node is not None:
            chain.append(node)
            node = node.parent
        self.table.touch([one.key for one in chain], used_s)
        for one in chain:
            one.last_use, one.used_s = self.table.sequence, used_s

    def expected_victims(self, need: int, keep: set[bytes], selected: set[bytes], count_max: int) -> list[int]:
        """Scores in the order in which blobs go: the leaf of lowest (score, -depth) among those that may."""
        kept: set[bytes] = set()
        for key in keep:
            node: Node | None = self.nodes.get(key)
            while node is not None:
                kept.add(node.key)
                node = node.parent
        left = {node.key: len(node.children) for node in self.nodes.values()}
        score = {node.key: node.last_use for node in self.nodes.values()}
        ready = {key for key, count in left.items() if not count and key in selected and key not in kept}
        named: list[int] = []
        freed = 0
        while ready and freed < need and len(named) < count_max:
            key = min(ready, key=lambda k: (score[k], -self.nodes[k].depth))
            ready.discard(key)
            named.append(score[key])
            freed += self.nodes[key].nbytes
            parent = self.nodes[key].parent
            if parent is not None:
                left[parent.key] -= 1
                if not left[parent.key] and parent.key in selected and parent.key not in kept:
                    score[parent.key] = max(score[key], score[parent.key])
                    ready.add(parent.key)
        return named


def grown(seed: int, steps: int) -> Model:
    """A model after so many steps."""
    model = Model(seed)
    for _ in range(steps):
        model.random.choice([model.add, model.add, model.add, model.touch, model.remove])()
    return model


seeds = {"seed": st.integers(0, 1 << 16), "steps": st.integers(0, 150)}


@settings(max_examples=60, deadline=None)
@given(**seeds, need=st.integers(0, 300), count_max=st.integers(1, 40), keeps=st.integers(0, 3))
def test_victims_are_the_oldest_leaves_and_never_a_parent_before_its_children(
    seed: int, steps: int, need: int, count_max: int, keeps: int
) -> None:
    """As many as are needed and no more, of those that a brute-force search names; what is kept keeps its ancestors."""
    model = grown(seed, steps)
    keep = set(model.random.sample(sorted(model.nodes), min(keeps, len(model.nodes))))
    namespaces = {0, 1}
    selected = {node.key for node in model.nodes.values() if node.namespace in namespaces}
    mask = where(model.table, namespaces=namespaces)
    got = victims(model.table, need, keep, mask, count_max=count_max)
    assert len(set(got)) == len(got) and set(got) <= selected
    goes = model.expected_victims(1 << 60, keep, selected, 1 << 30)
    sizes = [model.nodes[key].nbytes for key in got]
    assert sum(sizes[:-1]) < need or not got
    assert sum(sizes) >= need or len(got) == min(count_max, len(goes))
    for key in got:  # each is a leaf at its turn
        assert not model.nodes[key].children
        model.drop(model.nodes[key])


@settings(max_examples=60, deadline=None)
@given(**seeds)
def test_scores_of_victims_never_fall(seed: int, steps: int) -> None:
    """A parent goes no earlier than its last child."""
    model = grown(seed, steps)
    expected = model.expected_victims(1 << 60, set(), set(model.nodes), 1 << 30)
    assert len(victims(model.table, 1 << 60, count_max=1 << 30)) == len(expected) == len(model.nodes)
    assert expected == sorted(expected)


@settings(max_examples=40, deadline=None)
@given(**seeds)
def test_a_table_that_was_saved_in_pieces_is_the_same_again(seed: int, steps: int) -> None:
    """Also when only what changed was saved."""
    model, saved = Model(seed), {}
    for _ in range(steps):
        model.random.choice([model.add, model.add, model.touch, model.remove])()
        if model.random.random() < 0.3:
            saved.update(model.table.changed())
    saved.update(model.table.changed())
    loaded = Table.load(saved.items())
    assert set(loaded) == set(model.nodes) and len(loaded) == len(model.nodes)
    for key, node in model.nodes.items():
        for column in ("last_use", "used_s", "nbytes", "depth", "children", "namespace", "flags"):
            assert loaded.value(key, column) == model.table.value(key, column)
        assert loaded.value(key, "children") == len(node.children)
    for namespace in range(3):
        assert loaded.usage(namespace) == model.table.usage(namespace)
    assert loaded.sequence >= max((node.last_use for node in model.nodes.values()), default=0)


@settings(max_examples=40, deadline=None)
@given(**seeds)
def test_usage_is_the_sum_over_the_blobs(seed: int, steps: int) -> None:
    """By namespace and in all."""
    model = grown(seed, steps)
    for namespace in range(3):
        own = [node for node in model.nodes.values() if node.namespace == namespace]
        blocks = [node for node in own if not node.flags & CHECKPOINT]
        rest = [node for node in own if node.flags & CHECKPOINT]
        assert model.table.usage(namespace) == Usage(
            len(blocks),
            sum(node.n_tokens for node in blocks),
            sum(node.nbytes for node in own),
            len(rest),
            sum(node.nbytes for node in rest),
        )
    assert model.table.usage().disk_bytes == sum(node.nbytes for node in model.nodes.values())


@settings(max_examples=40, deadline=None)
@given(**seeds)
def test_a_tree_is_its_tops_and_all_that_comes_after_them(seed: int, steps: int) -> None:
    """However deep."""
    model = grown(seed, steps)
    tops = set(model.random.sample(sorted(model.nodes), min(2, len(model.nodes))))

    def below(node: Node | None) -> bool:
        return node is not None and (node.key in tops or below(node.parent))

    expected = {node.key for node in model.nodes.values() if below(node)}
    mask = tree(model.table, tops)
    assert {key for key in model.nodes if mask[model.table._slots[key]]} == expected


def test_what_is_pinned_stays_with_its_ancestors() -> None:
    """Whatever is needed."""
    table = Table()
    table.add(b"a" * 32, None, 0, depth=0, nbytes=1, n_tokens=1)
    table.add(b"b" * 32, b"a" * 32, 0, depth=1, nbytes=1, n_tokens=1, flags=PINNED)
    table.add(b"c" * 32, b"a" * 32, 0, depth=1, nbytes=1, n_tokens=1)
    assert victims(table, 100) == [b"c" * 32]
    assert reachable_bytes(table) == 1


def test_a_clock_that_was_ahead_poisons_neither_order_nor_age() -> None:
    """What was stamped in the future is as old as now, and ages from here on."""
    table = Table()
    for number, used_s in ((b"a", 100), (b"b", 9_000_000), (b"c", 200)):
        table.add(number * 32, None, 0, depth=0, nbytes=1, n_tokens=1)
        table.touch([number * 32], used_s)
    table.settle_clock(300)
    assert victims(table, 100, mask=where(table, unused_since_s=250)) == [b"a" * 32, b"c" * 32]
    assert victims(table, 100, mask=where(table, unused_since_s=300)) == [b"a" * 32, b"b" * 32, b"c" * 32]


@pytest.mark.parametrize("damage", ["short", "parent", "children", "twice"])
def test_a_saved_table_that_does_not_fit_together_is_corrupt(damage: str) -> None:
    """It is made again from the blobs."""
    model = grown(3, 120)
    saved = model.table.changed()
    number, data = max(saved.items())
    rows = np.frombuffer(bytearray(data), np.dtype(model.table._rows.dtype))
    live = np.flatnonzero(rows["flags"])
    if damage == "short":
        saved[number] = data[:-1]
    else:
        if damage == "parent":
            rows["parent"][live[0]] = CHUNK * (number + 5)
        elif damage == "children":
            rows["children"][live[0]] += 1
        else:
            rows["key"][live[0]] = rows["key"][live[1]]
        saved[number] = rows.tobytes()
    with pytest.raises(CorruptDataError):
        Table.load(saved.items())
