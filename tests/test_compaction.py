"""The index shrinks: mostly free pages are given back, by upkeep and by an eviction that needs the room."""

from __future__ import annotations

import contextlib
import shutil
import stat
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.core.blocks import Reason, pack_tokens
from kvstore.core.keys import Chain
from kvstore.engine import Engine, Fs, Selection
from kvstore.engine.shortage import INDEX_BYTES_MIN
from kvstore.index import index
from kvstore.index.index import COPY
from tests.support.engine import (
    Stopped,
    StoppingFs,
    blob_paths,
    find,
    namespace,
    new_block,
    options,
    put,
    require_sound,
)

NS, OTHER = namespace(), namespace("other")
KEPT = list(range(600))
ROWS = 3000


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with thousands of rows of a few tokens each, and one sequence that is longer."""
    data_dir = tmp_path_factory.mktemp("template") / "data"
    with Engine.open(data_dir, options(durability="none")) as engine:
        tails = [new_block(NS.root, NS.root, 0, number.to_bytes(8, "little") * 3) for number in range(ROWS)]
        assert engine.store(NS.to_record(), tails).blocks == ROWS
        assert put(engine, OTHER, KEPT).reason is Reason.OK
    return data_dir


@pytest.fixture(scope="module")
def freed_template(template: Path) -> Path:
    """The same, with all but the longer sequence evicted: the index is mostly free pages."""
    data_dir = Path(shutil.copytree(template, template.with_name("freed")))
    with Engine.open(data_dir, options(durability="none")) as engine:
        engine.evict(Selection(namespace_prefix=NS.root))
        assert engine.stats().index_bytes > 2 * INDEX_BYTES_MIN
    return data_dir


@pytest.fixture
def data_dir(tmp_path: Path, template: Path) -> Path:
    """A copy of the full one."""
    return Path(shutil.copytree(template, tmp_path / "data"))


@pytest.fixture
def freed(tmp_path: Path, freed_template: Path) -> Iterator[Engine]:
    """An engine on a copy of the other."""
    with Engine.open(Path(shutil.copytree(freed_template, tmp_path / "freed")), options()) as engine:
        yield engine


@pytest.mark.parametrize("part", [0.9, 0.5])
def test_with_a_budget_below_the_size_of_the_index_stores_go_on(data_dir: Path, part: float) -> None:
    """Rows are evicted as far as it takes, and the index is compacted; the budget is kept."""
    with Engine.open(data_dir, options()) as engine:
        stats = engine.stats()
        # Folders of ext4 do not shrink, so what this one grew to comes on top.
        folders_bytes = stats.used_bytes - stats.stored_bytes - stats.index_bytes
        budget_bytes = int(stats.index_bytes * part) + folders_bytes
    with Engine.open(data_dir, options(budget_bytes=budget_bytes)) as engine:
        assert engine.used_bytes <= budget_bytes and engine.degraded == ""
        assert engine.stats().blobs > 0
        for number in range(20):
            assert put(engine, NS, [-number, *range(400)]).reason is Reason.OK
            assert engine.used_bytes <= budget_bytes
        assert find(engine, NS, [-19, *range(400)]).n_tokens == 401
        require_sound(engine)


def test_nothing_is_evicted_for_a_store_that_does_not_fit_even_so(data_dir: Path) -> None:
    """Neither for one nor for many, and the index stays as it is."""
    with Engine.open(data_dir, options()) as engine:
        engine.limit(engine.used_bytes, 0)
        before = replace(engine.stats(), free_bytes=0)
        for _ in range(3):
            assert not engine.make_room(engine.budget_bytes)
            assert not engine.could_make_room(engine.budget_bytes)
        assert replace(engine.stats(), free_bytes=0) == before


def test_upkeep_gives_the_free_pages_of_an_index_back(freed: Engine) -> None:
    """What is stored is there; the file is private, and a start without a clean stop finds it whole."""
    freed.maintain()
    assert freed.stats().index_bytes < INDEX_BYTES_MIN
    assert find(freed, OTHER, KEPT).n_tokens == 600
    assert put(freed, NS, KEPT).reason is Reason.OK
    require_sound(freed)
    root = freed._shared.directory.root
    assert stat.S_IMODE((root / "index" / "data.mdb").stat().st_mode) == 0o600
    crashed = Path(shutil.copytree(root, root.with_name("crashed")))
    with Engine.open(crashed, options()) as engine:
        assert find(engine, OTHER, KEPT).n_tokens == find(engine, NS, KEPT).n_tokens == 600
        assert not list((root / "quarantine").iterdir())


def test_upkeep_leaves_an_index_that_is_mostly_used_and_one_that_was_compacted_just_now(freed: Engine) -> None:
    """A copy costs as much as it copies, so there is one a minute at most."""
    freed.maintain()
    with Engine.open(freed._shared.directory.root.with_name("second"), options()) as engine:
        put(engine, OTHER, KEPT)
        before = engine.stats().index_bytes
        engine.maintain()
        assert engine.stats().index_bytes == before
    assert not freed._evictor.compaction.keep_up()


def test_others_match_while_the_copy_is_made(freed: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only while the files change places they wait."""
    found, copied = [], index.copy_index

    def copy_index(*args: object, **named: object) -> None:
        reader = threading.Thread(target=lambda: found.append(find(freed, OTHER, KEPT).n_tokens))
        reader.start()
        reader.join(60)
        copied(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(index, "copy_index", copy_index)
    freed.maintain()
    assert found == [600] and freed.stats().index_bytes < INDEX_BYTES_MIN


def test_readers_that_come_while_the_files_change_places_are_let_in_afterwards(freed: Engine) -> None:
    """None of them sees a closed index."""
    stop, found = threading.Event(), set[int]()

    def read() -> None:
        while not stop.is_set():
            found.add(freed.match(Chain(OTHER.root, pack_tokens(KEPT))).n_tokens)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    done = [freed._evictor.compaction.run() for _ in range(5)]
    stop.set()
    for reader in readers:
        reader.join(30)
    assert found == {600} and all(done)


def test_a_reader_that_does_not_end_is_not_waited_for(freed: Engine) -> None:
    """The old file stays, also for that reader; the next upkeep that is due tries again."""
    before = freed.stats().index_bytes
    with freed._shared.index.view() as view:
        freed.maintain()
        assert view.count() == 3
    assert freed.stats().index_bytes == before and freed.degraded == ""
    assert find(freed, OTHER, KEPT).n_tokens == 600
    assert freed._evictor.compaction.run()
    require_sound(freed)


PROGRAMS = {
    "it dies": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "it dies half-way": "import os, sys; os.write(1, bytes(8192)); sys.exit(3)",
    "it hangs": "import time; time.sleep(60)",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_of_a_copy_that_fails_nothing_is_left(freed: Engine, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """The old file stays as it was; nothing is evicted in the hope of another copy until one succeeds."""
    monkeypatch.setattr(index, "_PROGRAM", PROGRAMS[program])
    monkeypatch.setattr(index, "_TIMEOUT_S", 0.5)
    file = freed._shared.directory.root / "index" / "data.mdb"
    before = file.read_bytes()
    freed.maintain()
    assert file.read_bytes() == before and not file.with_name(COPY).exists()
    assert freed.degraded == "" and find(freed, OTHER, KEPT).n_tokens == 600
    freed.limit(freed.stats().index_bytes // 2, 0)
    assert find(freed, OTHER, KEPT).n_tokens == 600 and put(freed, NS, KEPT).reason is Reason.STORE_FULL
    monkeypatch.undo()
    assert freed._evictor.compaction.run() and put(freed, NS, KEPT).reason is Reason.OK
    require_sound(freed)


def test_where_no_program_can_be_started_the_index_stays_as_it_is(
    freed: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is where the disk takes no copy."""
    before = freed.stats().index_bytes
    monkeypatch.setattr(sys, "executable", "/nowhere")
    assert not freed._evictor.compaction.run()
    monkeypatch.undo()
    monkeypatch.setattr(freed._shared.fs, "rename", lambda *_: (_ for _ in ()).throw(OSError("refused")))
    assert not freed._evictor.compaction.run()
    monkeypatch.undo()
    assert freed.stats().index_bytes == before
    require_sound(freed)


def test_an_index_that_cannot_be_opened_again_displaces_the_engine(
    freed: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a daemon begins anew; what is stored is there."""
    root = freed._shared.directory.root
    with monkeypatch.context() as patch:
        patch.setattr(index.os, "chmod", lambda *_: (_ for _ in ()).throw(OSError("too many files")))
        assert not freed._evictor.compaction.run()
    assert freed.is_displaced()
    freed.close()
    with Engine.open(root, options()) as engine:
        assert find(engine, OTHER, KEPT).n_tokens == 600
        require_sound(engine)


def test_a_kill_at_any_point_leaves_the_old_file_or_the_new_one(tmp_path: Path, freed_template: Path) -> None:
    """What is stored is there, what was evicted is not, and no copy is left."""
    at, sizes = 0, set[bool]()
    while True:
        killed, snapshot = Path(shutil.copytree(freed_template, tmp_path / f"run {at}")), tmp_path / f"killed {at}"
        with Engine.open(killed, options()) as engine:
            fs = StoppingFs(at, killed, snapshot)
            engine._shared.index._fs = fs
            with contextlib.suppress(Stopped):
                engine._evictor.compaction.run()
            engine._shared.index._fs = Fs()
            if not engine._shared.index.is_open:
                engine._shared.index._open()
        if not snapshot.exists():
            break
        with Engine.open(snapshot, options()) as engine:
            sizes.add(engine.stats().index_bytes < INDEX_BYTES_MIN)
            assert find(engine, OTHER, KEPT).n_tokens == 600 and len(blob_paths(snapshot)) == 3
            assert not (snapshot / "index" / COPY).exists()
            require_sound(engine)
        shutil.rmtree(killed)
        shutil.rmtree(snapshot)
        at += 1
    assert at >= 5 and sizes == {False, True}
