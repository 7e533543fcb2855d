"""Reads that do not return: what waits for them, for how long, and what becomes of their memory and threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from kvstore.blobs import ranges
from kvstore.blobs.ranges import FileReader, FileSource, unreadable_paths
from kvstore.blobs.readers import READERS, THREADS_MAX, Readers
from kvstore.client import reads
from kvstore.client.client import Client
from kvstore.client.results import Hit, LayerHit
from kvstore.codecs import virtual
from kvstore.core.blocks import Reason
from kvstore.errors import DeadlineError, ReadDeadlineError
from tests.support.checkpoints import hybrid_layout
from tests.support.fake_daemon import FakeDaemon
from tests.support.synthetic import assert_rows, make_layout, make_namespace
from tests.test_client_fetch import files_open

LAYOUT = make_layout(layers=3, heads=2, width=64)
TOKENS = [*range(600)]
PATIENT = {"connect_ms": 20_000, "stall_ms": 20_000, "total_ms": 60_000}
HURRIED_MS = 1500
HANG_S_MAX = 120.0


class HungDisk:
    """Reads, or openings, of one file that do not return until `release`."""

    def __init__(self) -> None:
        self.path = ""
        self.waiting = 0
        self._released = threading.Event()
        self._lock = threading.Lock()

    def hold(self) -> None:
        """Hold up the calling thread."""
        with self._lock:
            self.waiting += 1
        assert self._released.wait(HANG_S_MAX), "nothing released the disk"
        with self._lock:
            self.waiting -= 1

    def release(self) -> None:
        """Let everything return."""
        self._released.set()

    @property
    def released(self) -> bool:
        """Whether it was."""
        return self._released.is_set()


def until(answer: Callable[[], object], what: str) -> None:
    """Wait until something is so."""
    give_up_at = time.monotonic() + 60
    while not answer():
        assert time.monotonic() < give_up_at, what
        time.sleep(0.01)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[HungDisk]:
    """A disk whose reads of `path` hang."""
    hung = HungDisk()
    real = os.preadv

    def preadv(fd: int, views: Any, at: int) -> int:
        if hung.path and os.path.samestat(os.fstat(fd), os.stat(hung.path)):
            hung.hold()
        return real(fd, views, at)

    monkeypatch.setattr(os, "preadv", preadv)
    yield hung
    hung.release()
    until(lambda: not READERS.stuck and not hung.waiting, "reads that were released return")


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    """A daemon that holds the KV of TOKENS, raw."""
    with FakeDaemon(make_namespace(LAYOUT)) as fake:
        fake.hold(TOKENS)
        yield fake


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Client]:
    """A client of it."""
    with Client(daemon.config()) as made:
        yield made


@pytest.mark.parametrize("evaluate", [False, True])
def test_a_fetch_ends_at_its_deadline_while_a_read_hangs(
    evaluate: bool, daemon: FakeDaemon, client: Client, disk: HungDisk
) -> None:
    """A miss with that reason, no failure of the daemon's; once the read has returned the same fetch is a hit."""
    session = client.session(daemon.namespace, **PATIENT)
    assert session.fetch(TOKENS)
    disk.path = daemon.blocks[0].source.path
    answer = session.fetch(TOKENS, "packed", "path", HURRIED_MS, evaluate=evaluate)
    assert (answer.reason, disk.released, disk.waiting) == (Reason.DEADLINE, False, 1)
    assert session.fetch(TOKENS, "packed", "stream"), "the daemon is not blamed"
    disk.release()
    until(lambda: not READERS.stuck, "the read returns")
    hit = session.fetch(TOKENS, "packed", "path", evaluate=evaluate)
    assert isinstance(hit, Hit)
    assert_rows(hit.layers, LAYOUT, TOKENS[:-1])  # type: ignore[arg-type]


def test_layers_end_at_the_deadline_while_a_read_hangs(daemon: FakeDaemon, client: Client, disk: HungDisk) -> None:
    """The iterator raises; the circuit stays closed, since of the daemon it says nothing."""
    session = client.session(daemon.namespace, **{**PATIENT, "total_ms": HURRIED_MS})
    disk.path = daemon.blocks[1].source.path
    for _ in range(4):
        answer = session.fetch_layers(TOKENS, "path")
        if isinstance(answer, LayerHit):
            with pytest.raises(DeadlineError):
                list(answer.layers)
        else:
            assert answer.reason is Reason.DEADLINE
    assert (disk.waiting, disk.released) == (1, False)
    assert session.match(TOKENS), "the circuit is closed"


def test_a_checkpoint_that_cannot_be_read_ends_its_fetch(disk: HungDisk) -> None:
    """States are read by the same means."""
    daemon = FakeDaemon(make_namespace(hybrid_layout()))
    daemon.hold(TOKENS)
    daemon.hold_checkpoints(599)
    daemon.start()
    with Client(daemon.config()) as client:
        session = client.session(daemon.namespace, **PATIENT)
        assert session.fetch(TOKENS)
        disk.path = daemon.checkpoints[599].source.path
        assert session.fetch(TOKENS, total_ms=HURRIED_MS).reason is Reason.DEADLINE
        assert session.fetch(TOKENS).reason is Reason.DEADLINE, "at once: the session allows a minute"
        assert (disk.waiting, disk.released) == (1, False)
        disk.release()
    daemon.close()


def test_memory_and_files_of_a_read_that_hangs_live_until_it_returns(
    daemon: FakeDaemon, client: Client, disk: HungDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are counted meanwhile, so that hung reads cannot fill the memory; then all is given back."""
    session = client.session(daemon.namespace, **PATIENT)
    assert session.fetch(TOKENS)
    kept: list[object] = []
    real = reads.FileReads.keep
    monkeypatch.setattr(
        reads.FileReads, "keep", lambda own, left, memory, size: (kept.append(memory), real(own, left, memory, size))[1]
    )
    disk.path = daemon.blocks[0].source.path
    assert session.fetch(TOKENS, "packed", "path", HURRIED_MS).reason is Reason.DEADLINE
    held = client._budget.used_bytes
    assert held >= 600 * LAYOUT.token_bytes // 3, "a layer's buffers"
    assert len(kept) == 1 and sum(array.nbytes for array in kept[0].values()) == held  # type: ignore[attr-defined]
    assert files_open() and unreadable_paths() == {disk.path}
    disk.release()
    until(lambda: not client._budget.used_bytes, "the memory is given back")
    until(lambda: not files_open() and not unreadable_paths(), "the files are closed")


def test_a_file_that_hangs_is_not_read_again_before_it_returned(
    daemon: FakeDaemon, client: Client, disk: HungDisk
) -> None:
    """Later fetches are at once given what comes before it; no second thread is spent on it."""
    session = client.session(daemon.namespace, **PATIENT)
    disk.path = daemon.blocks[1].source.path
    assert session.fetch(TOKENS, "packed", "path", HURRIED_MS).reason is Reason.DEADLINE
    for _ in range(3):
        hit = session.fetch(TOKENS, "packed", "path")
        assert isinstance(hit, Hit)
        assert (hit.n_tokens, hit.reason) == (256, Reason.DEADLINE)
    assert (disk.waiting, disk.released) == (1, False)


def test_a_fetch_ends_at_its_deadline_while_opening_a_file_hangs(
    daemon: FakeDaemon, client: Client, disk: HungDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening and looking at a name wait for the disk as reading does."""
    session = client.session(daemon.namespace, **PATIENT)
    real = ranges._open_checked

    def opened(source: FileSource) -> int:
        if source.path == daemon.blocks[2].source.path:
            disk.hold()
        return real(source)

    monkeypatch.setattr(ranges, "_open_checked", opened)
    assert session.fetch(TOKENS, "packed", "path", HURRIED_MS).reason is Reason.DEADLINE
    assert (disk.waiting, disk.released) == (1, False)
    disk.release()
    until(lambda: not files_open(), "what was opened is closed")


def test_fetches_miss_at_once_when_every_reader_is_held(
    daemon: FakeDaemon, client: Client, disk: HungDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute is allowed, and not waited for."""
    monkeypatch.setattr(reads, "READERS", Readers(1))
    session = client.session(daemon.namespace, **PATIENT)
    disk.path = daemon.blocks[2].source.path
    assert session.fetch(TOKENS, "packed", "path", HURRIED_MS).reason is Reason.DEADLINE
    answer = session.fetch(TOKENS[:257], "packed", "path")
    assert (answer.reason, disk.released) == (Reason.DEADLINE, False)
    assert "reader threads" in answer.detail  # type: ignore[union-attr]
    disk.release()
    until(lambda: session.fetch(TOKENS[:257], "packed", "path"), "the thread reads again")


def test_what_comes_by_stream_needs_no_reader_of_files(daemon: FakeDaemon, client: Client) -> None:
    """Its bytes are here, so it does not wait behind reads of files that hang, for which nothing would end its wait."""
    session, gate = client.session(daemon.namespace, **PATIENT), threading.Event()
    answers: list[object] = []
    fetching = threading.Thread(target=lambda: answers.append(session.fetch(TOKENS, "packed", "stream")), daemon=True)
    try:
        for _ in range(THREADS_MAX):
            with pytest.raises(ReadDeadlineError):
                READERS.run(lambda: gate.wait(HANG_S_MAX), 0.2)
        assert READERS.stuck == THREADS_MAX
        fetching.start()
        fetching.join(30)
        assert READERS.stuck == THREADS_MAX and isinstance(next(iter(answers), None), Hit)
    finally:
        gate.set()
        until(lambda: not READERS.stuck, "the reads return")


def test_mlx_loads_files_while_every_reader_is_held(
    daemon: FakeDaemon, client: Client, disk: HungDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX has four threads for loads. Reads of ours that hang hold none of them."""
    monkeypatch.setattr(virtual, "SMALL_BYTES", 0)
    monkeypatch.setattr(reads, "OVERLAPPED_BYTES_MIN", 0)
    monkeypatch.setattr(reads, "usable_cores", lambda: 8)
    session = client.session(daemon.namespace, **PATIENT)
    disk.path = daemon.blocks[0].source.path
    assert session.fetch(TOKENS, "packed", "path", HURRIED_MS).reason is Reason.DEADLINE
    assert disk.waiting == 4, "two layers of two tensors"
    mx.save_safetensors(str(tmp_path / "file.safetensors"), {f"{n}": mx.ones(8) for n in range(8)})
    loaded = mx.load(str(tmp_path / "file.safetensors"))
    mx.eval(loaded)
    assert len(loaded) == 8 and not disk.released
    held = client._budget.used_bytes
    assert held >= 2 * 600 * LAYOUT.token_bytes // 3, "the buffers of two layers are counted, once each"
    assert held < 3 * 1024 * LAYOUT.token_bytes // 3
    disk.release()
    until(lambda: not client._budget.used_bytes, "the memory is given back")


@pytest.mark.parametrize(("cores", "reading"), [(1, 2), (2, 2), (4, 4)])
def test_a_fetch_uses_as_many_threads_as_there_are_cores(
    cores: int, reading: int, daemon: FakeDaemon, client: Client, disk: HungDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each of the two layers that are read at a time, or one for each tensor of theirs."""
    monkeypatch.setattr(virtual, "SMALL_BYTES", 0)
    monkeypatch.setattr(reads, "OVERLAPPED_BYTES_MIN", 0)
    monkeypatch.setattr(reads, "usable_cores", lambda: cores)
    session = client.session(daemon.namespace, **PATIENT)
    disk.path = daemon.blocks[0].source.path
    assert session.fetch(TOKENS, "packed", "path", HURRIED_MS).reason is Reason.DEADLINE
    assert disk.waiting == reading
    disk.release()
    until(lambda: not READERS.stuck, "the reads return")
    hit = session.fetch(TOKENS, "packed", "path")
    assert isinstance(hit, Hit)
    assert_rows(hit.layers, LAYOUT, TOKENS[:-1])  # type: ignore[arg-type]


def test_work_that_no_thread_has_begun_is_taken_back() -> None:
    """It holds no thread, so it is not counted as stuck."""
    pool, gate = Readers(1), threading.Event()
    with pytest.raises(ReadDeadlineError):
        pool.run(gate.wait, 0.2)
    until(lambda: pool.stuck == 1, "the work")
    with pytest.raises(ReadDeadlineError, match="all 1"):
        pool.run(gate.wait, 3600)
    queued = pool.start(lambda: 7)
    with pytest.raises(ReadDeadlineError, match="did not return"):
        pool.wait(queued, 0.05)
    assert pool.stuck == 1
    gate.set()
    until(lambda: not pool.stuck, "it returns")
    assert pool.run(lambda: 7, 60) == 7
    with pytest.raises(KeyError):
        pool.run(lambda: {}["gone"], 60)


def test_a_closed_reader_opens_nothing_more(tmp_path: Path) -> None:
    """A read that comes back late must not leave descriptors behind."""
    (tmp_path / "a").write_bytes(bytes(10))
    closed: list[int] = []
    reader = FileReader([FileSource(str(tmp_path / "a"), 0, 10)], closed=lambda: closed.append(1))
    assert reader.open_all()
    reader.close()
    with pytest.raises(ReadDeadlineError):
        reader.open_all()
    reader.close()
    assert closed == [1] and not files_open()


def test_a_process_ends_while_a_read_hangs() -> None:
    """The threads are daemon threads."""
    script = """
import threading
from kvstore.blobs.readers import READERS
try:
    READERS.run(threading.Event().wait, 0.1)
except TimeoutError:
    pass
except Exception as error:
    print(type(error).__name__)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout.strip()) == (0, "ReadDeadlineError"), run.stderr
