"""The engine's lock: held over commits, never while blobs are read, written or unlinked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.blobs.fs import Fs
from kvstore.engine import Engine, evict
from kvstore.engine.types import Selection
from tests.support.engine import find, namespace, options, put, require_sound

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


def stage(engine: Engine) -> None:
    """An upload needs all the room that is left, and more; then it ends."""
    nbytes = (1 << 20) - engine.used_bytes
    assert engine.reserve(nbytes)
    engine.add_usage(-nbytes)


WAYS: dict[str, Callable[[Engine], object]] = {
    "replaced": lambda engine: put(engine, NS, [*TOKENS, *range(100)]),
    "bytes": lambda engine: engine.evict(Selection(bytes=1)),
    "key": lambda engine: engine.evict(Selection(key_prefix=find(engine, NS, TOKENS).slices[2].row.key)),
    "budget": lambda engine: engine.limit(engine.used_bytes - (12 << 10), 0),
    "staging": stage,
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
