"""Stopped or refused at every single call: nothing that was acknowledged is lost, nothing is left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.core.blocks import Reason, pack_tokens
from kvstore.core.keys import Chain
from kvstore.engine import Engine, Selection, recover
from kvstore.engine.directory import DirectoryLock
from kvstore.errors import DirectoryError, KVStoreError
from tests.support.engine import (
    RecordingFs,
    Stopped,
    StoppingFs,
    blob_path,
    blob_paths,
    find,
    namespace,
    options,
    put,
    require_sound,
    sequence,
)

NS = namespace()
KEPT = list(range(300))
GROWN = list(range(600))
EVICTED = [-1, *range(600)]


def prepare(data_dir: Path) -> None:
    """A directory with two acknowledged sequences."""
    template = data_dir.parent / "template"
    if not template.exists():
        with Engine.open(template, options()) as engine:
            put(engine, NS, KEPT)
            put(engine, NS, EVICTED)
    shutil.copytree(template, data_dir)


def work(engine: Engine) -> None:
    """A store that replaces a tail, an eviction, and a store that must make room."""
    put(engine, NS, GROWN)
    engine.evict(Selection(key_prefix=find(engine, NS, EVICTED).slices[0].row.key))
    put(engine, NS, [-2, *range(400)])
    engine.close()


def count_calls(tmp_path: Path) -> int:
    """How many calls the work makes when nothing goes wrong."""
    prepare(tmp_path / "count")
    fs = RecordingFs()
    work(Engine.open(tmp_path / "count", options(), fs))
    return len(fs.calls)


def require_nothing_lost(data_dir: Path) -> None:
    """What was acknowledged before the work began is there; what is there is sound; and it can go on."""
    with Engine.open(data_dir, options()) as engine:
        require_sound(engine)
        assert find(engine, NS, KEPT).n_tokens == 300
        assert find(engine, NS, EVICTED).n_tokens in (0, 256, 512, 601)
        assert put(engine, NS, GROWN).reason is Reason.OK
        assert find(engine, NS, GROWN).n_tokens == 600
        require_sound(engine)


def test_a_stop_at_any_call_loses_and_leaks_nothing(tmp_path: Path) -> None:
    """The directory as it is at that moment, opened by a new engine."""
    total = count_calls(tmp_path)
    assert total > 30
    for at in range(total):
        data_dir, snapshot = tmp_path / f"d{at}", tmp_path / f"s{at}"
        prepare(data_dir)
        engine = Engine.open(data_dir, options(), StoppingFs(at, data_dir, snapshot))
        with pytest.raises(Stopped):
            work(engine)
        require_nothing_lost(snapshot)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EPERM])
def test_an_error_at_any_call_loses_and_leaks_nothing(tmp_path: Path, code: int) -> None:
    """The engine lives on: a full disk is STORE_FULL, anything else a typed error; then all goes on."""

    def strike() -> None:
        raise OSError(code, os.strerror(code))

    for at in range(count_calls(tmp_path)):
        data_dir = tmp_path / f"{code}-{at}"
        prepare(data_dir)
        fs = RecordingFs(at, strike)
        engine = Engine.open(data_dir, options(), fs)
        with contextlib.ExitStack() as expected:
            if code == errno.EPERM:
                expected.enter_context(contextlib.suppress(DirectoryError))
            receipt = put(engine, NS, GROWN)
            assert receipt.reason in (Reason.OK, Reason.STORE_FULL)
            assert find(engine, NS, GROWN).n_tokens >= (600 if receipt.reason is Reason.OK else 300)
            assert bool(engine.stats().degraded) == (receipt.reason is Reason.STORE_FULL)
        assert engine.stats().pending_bytes == 0
        assert find(engine, NS, KEPT).n_tokens == 300
        assert put(engine, NS, GROWN).reason is Reason.OK
        assert engine.stats().degraded == ""
        engine.check(repair=True)
        require_sound(engine)
        engine.close()
        require_nothing_lost(data_dir)


@pytest.mark.parametrize(
    ("refused", "ahead", "call"),
    [
        *((number, 0, "fsync") for number in range(5)),
        (0, 1, "write"),
        (3, 1, "write"),
        (2, 1, "fsync"),
        (4, 1, "fsync"),
    ],
)
def test_of_a_file_that_is_not_synced_and_those_after_it_nothing_stays(
    tmp_path: Path, refused: int, ahead: int, call: str
) -> None:
    """What came before it is acknowledged; the later ones may have been written by then, or be on their way."""

    class Refusing(RecordingFs):
        """Has no room for one of the files when it is written, or synced."""

        def _refuse(self, fd: int, name: str) -> None:
            if name == call and Path(self._paths[fd]).name.startswith(keys[refused].hex()):
                raise OSError(errno.ENOSPC, "no room")

        def write(self, fd: int, data: memoryview) -> int:
            self._refuse(fd, "write")
            return super().write(fd, data)

        def fsync(self, fd: int) -> None:
            self._refuse(fd, "fsync")
            super().fsync(fd)

    keys = Chain(NS.root, pack_tokens(range(5 * 256))).keys()
    with Engine.open(tmp_path / "data", options(), Refusing()) as engine:
        receipt = engine.store(NS.to_record(), sequence(NS, list(range(5 * 256))), ahead=ahead)
        assert (receipt.blocks, receipt.reason) == (refused, Reason.STORE_FULL)
        assert find(engine, NS, list(range(5 * 256))).n_tokens == 256 * refused
        assert len(blob_paths(tmp_path / "data")) == refused
        assert engine.stats().pending_bytes == 0 and engine.stats().degraded
        require_sound(engine)


@pytest.mark.parametrize(("ahead", "starts"), [(0, 0), (1, 0), (1, 1)])
def test_a_store_for_which_no_thread_can_be_started_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int, starts: int
) -> None:
    """As where the number of processes is limited: it is full, nothing of it turns up later, and the next one goes."""
    left, start = [starts], threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    with Engine.open(tmp_path / "data", options()) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            receipt = engine.store(NS.to_record(), sequence(NS, KEPT), ahead=ahead)
            assert receipt.reason is Reason.STORE_FULL
        assert engine.stats().pending_bytes == 0 and "new thread" in engine.stats().degraded
        assert blob_paths(tmp_path / "data") == set()
        assert put(engine, NS, KEPT).reason is Reason.OK
        assert len(blob_paths(tmp_path / "data")) == 2
        require_sound(engine)


def test_a_start_that_stops_at_any_call_can_be_repeated(tmp_path: Path) -> None:
    """Recovery itself is interrupted, again and again, until one gets through."""
    source = tmp_path / "source"
    prepare(source)
    engine = Engine.open(source, options())
    put(engine, NS, GROWN)
    crashed = tmp_path / "crashed"
    shutil.copytree(source, crashed)
    engine.close()
    for path in sorted(blob_paths(crashed))[:1]:
        (path.parent / (path.name + ".tmp")).write_bytes(b"torn")
    for at in range(100):
        data_dir, snapshot = tmp_path / f"d{at}", tmp_path / f"s{at}"
        shutil.copytree(crashed, data_dir)
        try:
            Engine.open(data_dir, options(), StoppingFs(at, data_dir, snapshot)).close()
        except Stopped:
            require_nothing_lost(snapshot)
        else:
            break
    assert 0 < at < 99


def crashed_copy(engine: Engine, target: Path) -> Path:
    """The directory as SIGKILL would leave it now."""
    shutil.copytree(engine._shared.directory.root, target)
    return target


@pytest.mark.parametrize("batch", [1, 2, 4096])
def test_after_an_unclean_stop_strays_go_and_rows_without_files_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """With everything after them; what is whole stays."""
    monkeypatch.setattr("kvstore.engine.recover.SWEEP_ROWS", batch)
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, list(range(900)))
        put(engine, NS, [*KEPT[:100], -5])
        lost = blob_path(engine, find(engine, NS, list(range(900))).slices[1].row)
        copy = crashed_copy(engine, tmp_path / "copy")
    (copy / lost.relative_to(tmp_path / "data")).unlink()
    for folder in (copy / "blobs.noindex" / root.hex() for root in (NS.root, bytes(32))):
        folder.mkdir(exist_ok=True, mode=0o700)
        (folder / f"{'0' * 64}-77.safetensors").write_bytes(b"stray")
        (folder / f"{'0' * 64}-78.safetensors.tmp").write_bytes(b"torn")
    with Engine.open(copy, options()) as engine:
        assert find(engine, NS, list(range(900))).n_tokens == 256
        assert find(engine, NS, [*KEPT[:100], -5]).n_tokens == 101
        assert engine.stats().evictions["repair"][0] == 3
        require_sound(engine)


def test_a_kill_during_the_first_store_of_all_leaves_no_damage_behind(tmp_path: Path) -> None:
    """An empty index beside a file is rebuilt; the blob that was being written is none, so it just goes."""
    with Engine.open(tmp_path / "data", options()) as engine:
        copy = crashed_copy(engine, tmp_path / "copy")
    folder = copy / "blobs.noindex" / bytes(32).hex()
    folder.mkdir(mode=0o700)
    (folder / f"{'0' * 64}-1.safetensors.tmp").write_bytes(b"")
    with Engine.open(copy, options()) as engine:
        assert engine.stats().quarantined == 0
        require_sound(engine)
    assert list(folder.iterdir()) == []


def test_without_syncs_an_unclean_stop_verifies_every_blob(tmp_path: Path) -> None:
    """Torn blobs go to quarantine, the index is rebuilt from the rest."""
    with Engine.open(tmp_path / "data", options(durability="none")) as engine:
        put(engine, NS, list(range(900)))
        torn = blob_path(engine, find(engine, NS, list(range(900))).slices[2].row)
        copy = crashed_copy(engine, tmp_path / "copy")
    path = copy / torn.relative_to(tmp_path / "data")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with Engine.open(copy, options()) as engine:
        assert find(engine, NS, list(range(900))).n_tokens == 512
        assert engine.stats().quarantined == 1
        require_sound(engine)


def test_a_clean_stop_is_trusted_and_an_unreadable_lock_file_is_not(tmp_path: Path) -> None:
    """After a clean stop nothing is read; words that cannot be read mean the worst."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, list(range(300)))
        path = blob_path(engine, find(engine, NS, list(range(300))).slices[0].row)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with Engine.open(tmp_path / "data", options()) as engine:
        assert engine.match(Chain(NS.root, pack_tokens(range(300)))).n_tokens == 300
    (tmp_path / "data" / "lock").write_bytes(b'{"pid": 1, "cle')
    with Engine.open(tmp_path / "data", options()) as engine:
        assert find(engine, NS, list(range(300))).n_tokens == 0
        assert engine.stats().quarantined == 1
        require_sound(engine)


def test_a_lock_file_says_how_the_last_holder_ended(tmp_path: Path) -> None:
    """Fresh, running, clean."""
    seen = []
    with Engine.open(tmp_path / "data", options(durability="full")) as engine:
        copy = crashed_copy(engine, tmp_path / "copy")
    for root in (copy, tmp_path / "data"):
        with DirectoryLock(engine._shared.directory.__class__(root)) as hold:
            seen.append((hold.previous["clean"], hold.previous["durability"]))
    assert seen == [(False, "full"), (True, "full")]


@pytest.mark.parametrize("damage", ["garbage", "zeros", "empty", "half"])
def test_an_index_that_cannot_be_read_is_rebuilt(tmp_path: Path, damage: str) -> None:
    """From blob headers; the damaged one is kept for a look."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, list(range(600)))
    path = tmp_path / "data" / "index" / "data.mdb"
    data = path.read_bytes()
    path.write_bytes(
        {"garbage": os.urandom(len(data)), "zeros": bytes(len(data)), "empty": b"", "half": data[:8192]}[damage]
    )
    try:
        with Engine.open(tmp_path / "data", options()) as engine:
            assert find(engine, NS, list(range(600))).n_tokens == 600
            assert engine.check().findings == []
    except KVStoreError as error:
        pytest.fail(f"{damage}: {error!r}")


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE])
def test_an_index_that_may_not_be_read_now_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: bool, number: int
) -> None:
    """The start fails, and nothing goes to quarantine: the index is as it was when the reason has gone."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, list(range(600)))
        crashed_copy(engine, tmp_path / "copy")
    root = tmp_path / ("data" if clean else "copy")

    def refuse(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(recover, "digest", refuse)
        patch.setattr(recover, "require_whole", refuse)
        with pytest.raises((KVStoreError, OSError), match=os.strerror(number)):
            Engine.open(root, options())
    assert list((root / "quarantine").iterdir()) == []
    with Engine.open(root, options()) as engine:
        assert find(engine, NS, list(range(600))).n_tokens == 600
        assert engine.stats().quarantined == 0


def test_a_deleted_index_is_rebuilt_at_start(tmp_path: Path) -> None:
    """Blobs say everything about themselves."""
    with Engine.open(tmp_path / "data", options()) as engine:
        put(engine, NS, list(range(600)))
        put(engine, namespace("b"), list(range(10)))
        before = {(info.row.key, info.path) for info in engine.list_blocks()}
    shutil.rmtree(tmp_path / "data" / "index")
    with Engine.open(tmp_path / "data", options()) as engine:
        assert {(info.row.key, info.path) for info in engine.list_blocks()} == before
        assert {one.info.alias for one in engine.stats().namespaces} == {"weights", "b"}
        assert put(engine, NS, list(range(700))).reason is Reason.OK
        require_sound(engine)


def test_an_access_order_that_finds_no_room_is_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk is nothing that a traceback explains; what was noted is lost, and that is all."""

    class Full(RecordingFs):
        """No commit goes through once `dead` is set."""

        def commit(self, commit: Callable[[], None]) -> None:
            if self.dead:
                raise OSError(errno.ENOSPC, "no room")
            super().commit(commit)

    fs = Full()
    with Engine.open(tmp_path / "data", options(touches_max=1), fs) as engine:
        put(engine, NS, KEPT)
        fs.dead = True
        engine.touch(find(engine, NS, KEPT).slices)
        engine.maintain()
        fs.dead = False
        assert find(engine, NS, KEPT).n_tokens == 300
    [line] = [record for record in caplog.records if "access order" in record.message]
    assert "no room" in line.message and line.exc_info is None
