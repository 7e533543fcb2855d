"""Offers of blocks that change between a hit and their turn: what takes a block's place is pushed for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvstore.config import Config
from kvstore.core.blocks import FIDELITY_EXACT
from kvstore.core.remote_words import RemoteReason
from kvstore.engine import Engine, Selection
from kvstore.index.rows import Row
from kvstore.remote.tier import RemoteTier
from kvstore.server.tier.remote_tier import Remote
from tests.support.engine import blob_path, find, namespace, options, put, sequence
from tests.support.memory_objects import MemoryStore
from tests.support.remote_blobs import name_of
from tests.test_remote_tier import objects, push_all, tier_over

NS = namespace("pushed")
SHORT, LONGER = range(300), range(400)
Change = Callable[[Engine, Path], None]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """It holds SHORT at a low rank."""
    with Engine.open(tmp_path / "data", options(durability="none")) as opened:
        put(opened, NS, SHORT, fidelity=80)
        yield opened


@pytest.fixture
def remote(engine: Engine, tmp_path: Path) -> Remote:
    """The tier of a daemon over it, which nothing starts."""
    config = Config(data_dir=tmp_path / "data", remote=f"file://{tmp_path}/share")
    made = Remote(engine, None, None, SimpleNamespace(remote=None), config)  # type: ignore[arg-type]
    made._tier = tier_over(MemoryStore(), load=made._load)
    return made


def adopt_longer(engine: Engine, tmp_path: Path) -> None:
    """A repair finds the blob of a longer tail that has no row."""
    with Engine.open(tmp_path / "other", options(durability="none")) as other:
        put(other, NS, LONGER)
        blob = blob_path(other, find(other, NS, LONGER).slices[-1].row)
        folder = blob_path(engine, find(engine, NS, SHORT).slices[-1].row).parent
        shutil.copy(blob, folder / f"{blob.name.partition('-')[0].partition('.')[0]}-99.safetensors")
    assert engine.check(repair=True).repaired


def stores(*ends: int) -> Change:
    """Longer sequences come, one after another."""

    def change(engine: Engine, tmp_path: Path) -> None:
        for end in ends:
            put(engine, NS, range(end))

    return change


# What happens, and the sequence whose blocks are then pushed.
CHANGES: dict[str, tuple[Change, range]] = {
    "a longer tail": (stores(400), LONGER),
    "a full block": (stores(520), range(512)),
    "one after another": (stores(310, 380, 450, 512), range(512)),
    "a higher rank": (stores(300), SHORT),
    "a repair": (adopt_longer, LONGER),
}


def tier_of(remote: Remote) -> tuple[RemoteTier, MemoryStore]:
    """The tier, and what it pushes to."""
    return remote._tier, remote._tier.store._store  # type: ignore[return-value]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before it is looked at", "in the queue"])
def test_what_replaces_a_block_before_its_turn_is_pushed_for_it(
    engine: Engine, remote: Remote, tmp_path: Path, change: str, when: str
) -> None:
    """A longer tail, a full block, better values: nobody has to ask for it again."""
    tier, store = tier_of(remote)
    remote.push([find(engine, NS, SHORT).slices[-1].row.key])
    if when == "in the queue":
        remote.step()
    replace, wanted = CHANGES[change]
    replace(engine, tmp_path)
    remote.step()
    push_all(tier)
    expected = {name_of(part.row.block, NS) for part in find(engine, NS, wanted).slices}
    assert expected <= objects(store).keys()
    assert tier.stats().not_pushed == {}


def test_a_blob_that_is_exchanged_just_as_it_is_read_is_pushed(
    engine: Engine, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at its row and its lease."""
    tier, store = tier_of(remote)
    lease = engine._shared.deletions.lease

    def exchange(rows: tuple[Row, ...], *given: object) -> object:
        monkeypatch.undo()
        put(engine, NS, SHORT)
        return lease(rows, *given)  # type: ignore[arg-type]

    remote.push([find(engine, NS, SHORT).slices[-1].row.key])
    remote.step()
    monkeypatch.setattr(engine._shared.deletions, "lease", exchange)
    push_all(tier)
    (_, tail) = find(engine, NS, SHORT).slices
    assert tail.row.fidelity == FIDELITY_EXACT and name_of(tail.row.block, NS) in objects(store)
    assert tier.stats().not_pushed == {}


def test_what_was_evicted_with_what_replaced_it_is_gone(engine: Engine, remote: Remote) -> None:
    """And counted so."""
    tier, store = tier_of(remote)
    remote.push([find(engine, NS, SHORT).slices[-1].row.key])
    remote.step()
    put(engine, NS, LONGER)
    engine.evict(Selection(all=True))
    push_all(tier)
    assert objects(store) == {}
    assert tier.stats().not_pushed == {RemoteReason.GONE: 2}
    assert len(sequence(NS, SHORT)) == 2
