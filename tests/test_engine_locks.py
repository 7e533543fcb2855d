"""The engine's lock is held over the rows of one commit, never over the whole table of blobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.core.blocks import Reason
from kvstore.engine import Engine, Selection, retain
from tests.support.engine import chosen_by_auto, namespace, new_block, options, require_sound, sequence

NS = namespace()


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Two sequences that `auto` stored. A thread that looks through the whole table while it has the lock fails."""
    with Engine.open(tmp_path / "data", options(budget_bytes=1 << 30)) as opened:
        for first in (0, 1000):
            blocks = [chosen_by_auto(new) for new in sequence(NS, list(range(first, first + 600)))]
            assert opened.store(NS.to_record(), blocks).reason is Reason.OK
        lock: Any = opened._shared.lock

        def unlocked(work: Callable[..., Any]) -> Callable[..., Any]:
            def checked(*args: Any) -> Any:
                assert not lock._is_owned(), f"{work.__name__} under the lock"
                return work(*args)

            return checked

        monkeypatch.setattr(retain, "_kept", unlocked(retain._kept))
        monkeypatch.setattr(retain, "tree", unlocked(retain.tree))
        monkeypatch.setitem(retain.POLICIES, "lru", unlocked(retain.POLICIES["lru"]))
        yield opened


def some_key(engine: Engine) -> bytes:
    """Of a block that is stored."""
    return next(iter(engine._shared.index.table))


def re_encode(engine: Engine) -> None:
    """The coldest block."""
    (row,) = engine.reencoder.coldest([NS.root], 1)
    assert engine.reencoder.reencode(row, new_block(row.root, row.parent, row.start, row.tokens, 400), 0.25)


@pytest.mark.parametrize(
    "work",
    [
        lambda engine: engine.evict(Selection(bytes=1)),
        lambda engine: engine.evict(Selection(namespace_prefix=NS.root)),
        lambda engine: engine.evict(Selection(idle_s=1), dry_run=True),
        lambda engine: engine.limit(engine.used_bytes - 1, 0, at_once=True),
        lambda engine: engine.limit(1 << 30, 0, 1, at_once=True),
        lambda engine: engine.keeper.would_delete(budget_bytes=1, ttl_s=1),
        lambda engine: engine.keeper.pin(NS.root, [some_key(engine)]),
        lambda engine: engine.keeper.unpin([some_key(engine)]),
        lambda engine: engine.keeper.pinned_bytes(),
        re_encode,
    ],
    ids=["bytes", "namespace", "dry run", "budget", "ttl", "preview", "pin", "unpin", "pinned", "re-encode"],
)
def test_nothing_is_chosen_from_the_whole_table_under_the_lock(engine: Engine, work: Callable[[Engine], Any]) -> None:
    """With 100,000 blocks a choice takes 15 to 40 ms; nothing could be stored meanwhile."""
    work(engine)
    require_sound(engine)


def test_what_changed_after_it_was_chosen_is_not_evicted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is pinned, or that gets a child, between the choice and the commit."""
    choose = engine._evictor._choose
    pinned = engine._shared.index.table.keys([2])

    def chosen(*args: Any) -> list[bytes]:
        found = choose(*args)
        if not engine.keeper.pins:
            assert pinned[0] in found
            engine.keeper.pin(NS.root, pinned)
            blocks = [new for new in sequence(NS, [*range(1000, 1512), *range(300)]) if new.block.start >= 512]
            assert engine.store(NS.to_record(), blocks).reason is Reason.OK
        return found

    monkeypatch.setattr(engine._evictor, "_choose", chosen)
    engine.evict(Selection(bytes=1 << 40))
    assert set(engine._shared.index.table.keys([0, 1, 2])) == set(engine._shared.index.table)
    require_sound(engine)
