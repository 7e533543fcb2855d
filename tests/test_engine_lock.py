"""The engine's lock: held over commits, never while blobs are read, written or unlinked."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvstore.blobs.fs import Fs
from kvstore.engine import Engine, Selection, adopt, check, evict
from kvstore.index.table import Table
from kvstore.index.transaction import Edit
from tests.support.engine import blob_path, drop_children, find, namespace, options, put, require_sound

NS, OTHER = namespace(), namespace("other")
TOKENS = list(range(2000))


class Watch(Fs):
    """Notes the calls that the holder of the engine's lock makes, and can stand still in an unlink."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.locked: set[str] = set()
        self.is_open = threading.Event()
        self.is_open.set()
        self.arrived = threading.Event()

    def _note(self, call: str) -> None:
        if self.engine is not None and self.engine._shared.lock._is_owned():  # type: ignore[attr-defined]
            self.locked.add(call)

    def fsync(self, fd: int) -> None:
        """As Fs."""
        self._note("fsync")
        super().fsync(fd)

    def fsync_dir(self, path: str) -> None:
        """As Fs."""
        self._note("fsync_dir")
        super().fsync_dir(path)

    def write(self, fd: int, data: memoryview) -> int:
        """As Fs."""
        self._note("write")
        return super().write(fd, data)

    def unlink(self, path: str) -> None:
        """As Fs, when it is open."""
        self._note("unlink")
        if path.endswith(".safetensors"):
            self.arrived.set()
            assert self.is_open.wait(30)
        super().unlink(path)


@pytest.fixture
def fs() -> Watch:
    """The disk."""
    return Watch()


@pytest.fixture
def engine(tmp_path: Path, fs: Watch) -> Iterator[Engine]:
    """An engine that holds eight blocks of NS, and one of OTHER."""
    with Engine.open(tmp_path / "data", options(budget_bytes=1 << 20), fs) as made:
        put(made, NS, TOKENS)
        put(made, OTHER, TOKENS[:256])
        fs.engine = made
        yield made
        fs.is_open.set()


WAYS: dict[str, Callable[[Engine], object]] = {
    "replaced": lambda engine: put(engine, NS, [*TOKENS, *range(100)]),
    "bytes": lambda engine: engine.evict(Selection(bytes=1)),
    "key": lambda engine: engine.evict(Selection(key_prefix=find(engine, NS, TOKENS).slices[2].row.key)),
    "budget": lambda engine: engine.limit(engine.used_bytes - (12 << 10), 0),
    "room": lambda engine: engine.make_room((1 << 20) - engine.used_bytes),
    "lost blob": lambda engine: (lose_a_blob(engine), engine.check(repair=True)),
    "strays": lambda engine: (lose_rows(engine, with_first_blob=True), engine.check(repair=True)),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_blob_is_written_or_unlinked_under_the_lock(engine: Engine, fs: Watch, way: str) -> None:
    """Whatever it is that goes, and why."""
    WAYS[way](engine)
    assert fs.arrived.is_set()
    assert not fs.locked
    require_sound(engine)


@pytest.mark.parametrize("selection", [Selection(bytes=1 << 30), Selection(all=True)])
def test_a_store_does_not_wait_for_an_eviction_in_another_namespace(
    engine: Engine, fs: Watch, selection: Selection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its steps, and while its unlinks stand still, the index belongs to others; upkeep goes on, too."""
    monkeypatch.setattr(evict, "VICTIMS_MAX", 2)
    fs.is_open.clear()
    with ThreadPoolExecutor(2) as pool:
        evicting = pool.submit(engine.evict, selection)
        assert fs.arrived.wait(60)
        stored = pool.submit(put, engine, namespace("third"), TOKENS[:256])
        assert stored.result(60).reason == "ok"
        assert engine.stats().blobs >= 1
        assert find(engine, namespace("third"), TOKENS[:256]).n_tokens == 256
        assert not evicting.done()
        fs.is_open.set()
        report = evicting.result(60)
    assert report.blocks >= 9 and not report.kept_bytes
    require_sound(engine)


def test_what_is_being_unlinked_is_no_stray_and_is_counted(engine: Engine, fs: Watch) -> None:
    """A check that runs meanwhile takes nothing back, and the budget counts what is still on the disk."""
    used = engine.used_bytes
    fs.is_open.clear()
    with ThreadPoolExecutor(1) as pool:
        evicting = pool.submit(engine.evict, Selection(bytes=1 << 30))
        assert fs.arrived.wait(60)
        assert engine.used_bytes >= used
        assert engine.check(repair=True).findings == []
        assert not find(engine, NS, TOKENS).n_tokens
        fs.is_open.set()
        assert evicting.result(60).blocks == 9
    assert engine.used_bytes < used
    assert not find(engine, NS, TOKENS).n_tokens


def test_those_who_need_room_evict_once(engine: Engine, fs: Watch) -> None:
    """Many at once, for whom one eviction is enough, do not each evict for the same deficit."""
    engine.limit(engine.used_bytes + (20 << 10), 0)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: engine.make_room(40 << 10), range(8)))
    evicted = sum(blocks for blocks, _ in engine.stats().evictions.values())
    assert 0 < evicted <= 9
    assert engine.used_bytes > (40 << 10)


class CountingLock:
    """A lock that knows how many rows its holder has looked at or changed, by what was done, and the most of each."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()

    def __enter__(self) -> CountingLock:
        self._lock.acquire()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.most |= self._now
            self._now.clear()
        self._lock.release()

    def count(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, rows: Callable[[Any], int]) -> None:
        """Count the rows of each call of a function."""
        called = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            if self._depth:
                self._now[name] += rows(arguments)
            return called(*arguments, **named)

        monkeypatch.setattr(owner, name, counted)


def lose_a_blob(engine: Engine) -> None:
    """The first of a chain."""
    blob_path(engine, find(engine, NS, TOKENS).slices[0].row).unlink()


def lose_rows(engine: Engine, with_first_blob: bool = False) -> None:
    """Of all blobs of a chain, which become strays; without the first one nothing leads to the others."""
    rows = [part.row for part in find(engine, NS, TOKENS).slices]
    if with_first_blob:
        blob_path(engine, rows[0]).unlink()
    with engine._shared.index.edit() as edit:
        for row in reversed(rows):
            edit.remove(row)


def lose_the_table(engine: Engine) -> None:
    """Every other blob in it, and a namespace's worth of sizes is wrong."""
    rows = [part.row for part in find(engine, NS, TOKENS).slices]
    with engine._shared.index.edit() as edit:
        for row in rows[::2]:
            edit.table.drop(row.key)
        for row in rows[1::2]:
            edit.table.resize(row.key, 1)


def lose_what_the_table_names(engine: Engine) -> None:
    """The rows of a chain, whose blobs the table still has."""
    rows = [part.row for part in find(engine, NS, TOKENS).slices]
    with engine._shared.index.edit() as edit:
        for row in rows:
            edit._txn.delete(row.key, db=edit._db["rows"])


@pytest.mark.parametrize("lose", [lose_a_blob, lose_rows, drop_children, lose_the_table, lose_what_the_table_names])
def test_a_repair_holds_the_lock_over_a_batch_of_rows_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lose: Callable[[Engine], None]
) -> None:
    """However many rows are compared, mended, adopted or dropped; afterwards nothing is wrong, and all is in order."""
    monkeypatch.setattr(check, "LOCKED_ROWS_MAX", 2)
    monkeypatch.setattr(adopt, "ADOPTED_MAX", 2)
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, TOKENS)
        put(engine, OTHER, TOKENS[:256])
        lose(engine)
        lock = CountingLock()
        monkeypatch.setattr(engine._shared, "lock", lock)
        monkeypatch.setattr(engine._shared.site, "lock", lock)
        for owner, name in ((Edit, "put"), (Edit, "mend"), (Edit, "remove"), (Table, "drop"), (check, "_difference")):
            lock.count(monkeypatch, owner, name, lambda _: 1)
        lock.count(monkeypatch, engine._shared.site, "delete", lambda arguments: len(arguments[0]))
        assert engine.check(repair=True).findings
        assert lock.most["_difference"] and max(lock.most.values()) == 2
        assert engine.check().findings == []
        if lose is lose_the_table:
            top = find(engine, NS, TOKENS).slices[0].row
            assert engine.evict(Selection(key_prefix=top.key)).blocks == 8
        require_sound(engine)
