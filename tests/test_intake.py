"""The bytes of an upload as its thread pulls them: exactly as many as were asked for, or an error that says why."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.core.byte_budget import ByteBudget
from kvstore.errors import DeadlineError, InvalidRequestError, KVStoreError, LimitError, NotFoundError
from kvstore.server.fetching.stream_out import BATCH_BYTES
from kvstore.server.storing import upload_socket as module
from kvstore.server.storing import uploads
from kvstore.server.storing.stream_in import StreamIn
from kvstore.server.storing.upload_socket import CONFIRMED, UPLOAD_ID_BYTES, SocketSource, UploadSocket
from kvstore.server.storing.uploads import Intake
from kvstore.wire.frames import UploadBytes
from tests.support.clock import Clock
from tests.support.intake import BytesSource
from tests.support.servers import wait_until

DATA = bytes(range(256)) * 40


@pytest.fixture
def ends() -> Iterator[tuple[SocketSource, socket.socket]]:
    """A source, and its worker's end."""
    mine, theirs = socket.socketpair()
    source = SocketSource(mine)
    yield source, theirs
    source.close()
    theirs.close()


def opened(source: Any, nbytes: int = len(DATA)) -> Intake:
    """An intake that reads from this source."""
    made = Intake(nbytes)
    made.open(source)
    return made


def filled(intake: Intake, nbytes: int = len(DATA), idle_s: float = 10.0) -> bytes:
    """The next so many bytes."""
    memory = bytearray(nbytes)
    intake.fill(memoryview(memory), idle_s)
    return bytes(memory)


def late(work: Callable[[], object], after_s: float = 0.2) -> threading.Thread:
    """Do something in a moment, on a thread of its own."""
    thread = threading.Timer(after_s, work)
    thread.start()
    return thread


@pytest.mark.parametrize("sizes", [[10_240], [1, 10_239], [3000, 7000, 240]])
def test_bytes_come_in_order_whatever_is_asked_for(
    ends: tuple[SocketSource, socket.socket], sizes: Sequence[int]
) -> None:
    """And the worker hears when all of them are there."""
    source, theirs = ends
    intake = opened(source)
    theirs.sendall(DATA)
    theirs.shutdown(socket.SHUT_WR)
    assert b"".join(filled(intake, size) for size in sizes) == DATA
    intake.finish(10.0)
    assert intake.received_bytes == len(DATA)
    assert theirs.recv(2) == CONFIRMED


@pytest.mark.parametrize("size", [0, 1, len(DATA) - 1])
def test_too_few_bytes_are_refused(ends: tuple[SocketSource, socket.socket], size: int) -> None:
    """When the worker ends its side, or goes away."""
    source, theirs = ends
    theirs.sendall(DATA[:size])
    theirs.close()
    with pytest.raises(InvalidRequestError, match=f"{size} bytes, {len(DATA)} were"):
        filled(opened(source))


def test_a_byte_too_many_is_refused(ends: tuple[SocketSource, socket.socket]) -> None:
    """Nothing is confirmed then."""
    source, theirs = ends
    intake = opened(source)
    theirs.sendall(DATA + b"x")
    filled(intake)
    with pytest.raises(InvalidRequestError, match="longer than"):
        intake.finish(10.0)
    source.close()
    assert theirs.recv(1) == b""


def test_a_worker_that_stalls_is_noticed_and_one_that_is_slow_is_not(
    ends: tuple[SocketSource, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte counts as a sign of life; the time that the daemon takes for itself does not count at all."""
    source, theirs = ends
    clock, ended = Clock(), threading.Event()
    monkeypatch.setattr(uploads, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(module, "LOOK_UP_S", 0.05)
    module.block_for(source._connection, 0.05)
    intake = opened(source, 6)

    def silent() -> None:
        while not ended.wait(0.01):
            clock.now_s += 0.3

    def slow() -> None:
        for number in range(6):
            clock.now_s += 1.0
            theirs.sendall(bytes([number]))
            wait_until(lambda number=number: intake.received_bytes > number, 60, lambda: "no byte came")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(silent)
        with pytest.raises(DeadlineError):
            filled(intake, 1, 1.2)
        ended.set()
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(slow)
        assert filled(intake, 6, 1.2) == bytes(range(6))
        sent.result(60)
    waited_s = intake.waited_s
    clock.now_s += 100.0
    assert intake.idle_s == 0 and intake.waited_s == waited_s > 4.9


@pytest.mark.parametrize("where", ["fill", "await_commit"])
def test_giving_up_wakes_the_thread(ends: tuple[SocketSource, socket.socket], where: str) -> None:
    """At once, and with the reason."""
    source, theirs = ends
    intake = opened(source)
    late(lambda: intake.give_up(NotFoundError("gone")))
    started = time.monotonic()
    with pytest.raises(NotFoundError, match="gone"):
        filled(intake) if where == "fill" else intake.await_commit()
    assert time.monotonic() - started < module.LOOK_UP_S
    assert theirs.recv(1) == b""
    with pytest.raises(NotFoundError):
        intake.open(BytesSource([DATA]))


def test_what_was_committed_cannot_be_given_up_any_more() -> None:
    """From the moment at which the thread goes on."""
    intake = opened(BytesSource([DATA]))
    filled(intake)
    late(intake.commit)
    intake.await_commit()
    intake.give_up()
    intake.await_commit()
    assert intake.error is None


def test_a_commit_of_what_was_never_sent_is_refused() -> None:
    """Unless nothing is asked for."""
    with pytest.raises(InvalidRequestError, match="0 bytes, 5 were"):
        Intake(5).commit()
    Intake(0).commit()


def test_one_source_an_upload() -> None:
    """The first; and none where no bytes are wanted."""
    intake = opened(BytesSource([DATA]))
    for full in (intake, Intake(0)):
        with pytest.raises(InvalidRequestError, match="takes no bytes"):
            full.open(BytesSource([DATA]))
    assert filled(intake) == DATA


def test_an_upload_is_ended_whose_worker_names_it_and_is_gone(tmp_path: Path) -> None:
    """Its thread begins and finds no bytes: otherwise it would stay in the table, as one that the daemon works on."""
    upload: Any = SimpleNamespace(intake=Intake(len(DATA)))
    begun: list[Any] = []

    async def main() -> None:
        receiving = UploadSocket(SimpleNamespace(get=lambda name: upload), begun.append, 1)  # type: ignore[arg-type]
        receiving.bind(str(tmp_path / "uploads"))
        receiving.listen()
        with socket.socket(socket.AF_UNIX) as worker:
            worker.connect(str(tmp_path / "uploads"))
            worker.sendall(b"u" * UPLOAD_ID_BYTES)
        while upload.intake._source is None:
            await asyncio.sleep(0.01)
        receiving.close()

    asyncio.run(main())
    assert begun == [upload]
    with pytest.raises(InvalidRequestError, match="0 bytes, "):
        filled(upload.intake)
    upload.intake.close()


# -- chunks of a stream ------------------------------------------------------------------------------------------------


class Stream:
    """One upload by stream: chunks on the event loop, and the thread that pulls them."""

    def __init__(self, nbytes: int, memory_bytes: int = 1 << 30) -> None:
        self.upload: Any = SimpleNamespace(intake=Intake(nbytes), upload_bytes=nbytes)
        self.budget = ByteBudget(memory_bytes)
        self.pulled: bytes | KVStoreError = b""
        self._thread = threading.Thread(target=self._pull)

    def get(self, upload_id: str) -> Any:
        """As `Uploads.get`."""
        return self.upload

    def _pull(self) -> None:
        try:
            self.pulled = filled(self.upload.intake, self.upload.upload_bytes)
        except KVStoreError as error:
            self.pulled = error
        finally:
            self.upload.intake.close()

    def receive(self, chunks: AsyncIterator[UploadBytes], idle_s: float = 10.0, pull: bool = True) -> int:
        """All chunks, by a handler; what it answers."""

        async def run() -> int:
            begin = self._thread.start if pull else lambda: None
            stream = StreamIn(self, lambda upload: begin(), self.budget, idle_s)  # type: ignore[arg-type]
            try:
                return await stream.receive(chunks)
            except BaseException:
                self.upload.intake.give_up()
                raise
            finally:
                if pull and stream.upload is not None:
                    await asyncio.to_thread(self._thread.join)

        return asyncio.run(run())


async def chunks_of(data: bytes, step: int, pause_s: float = 0.0) -> AsyncIterator[UploadBytes]:
    """Bytes in chunks; the first names the upload."""
    for at in range(0, len(data), step):
        yield UploadBytes("u" if not at else "", memoryview(data)[at : at + step])
        await asyncio.sleep(pause_s)


@pytest.mark.parametrize("step", [1000, len(DATA)])
def test_a_stream_is_pulled_whole(step: int) -> None:
    """And its memory is given back."""
    stream = Stream(len(DATA))
    assert stream.receive(chunks_of(DATA, step)) == len(DATA)
    assert stream.pulled == DATA
    assert stream.budget.used_bytes == 0


@pytest.mark.parametrize(("size", "word"), [(100, "100 bytes, 10240 were"), (len(DATA) + 1, "longer than")])
def test_a_stream_of_another_size_is_refused(size: int, word: str) -> None:
    """Before a byte too many is taken; the thread gets an error, too."""
    stream = Stream(len(DATA))
    with pytest.raises(InvalidRequestError, match=word):
        stream.receive(chunks_of(bytes(size), 1000))
    assert isinstance(stream.pulled, KVStoreError)
    assert stream.budget.used_bytes == 0


def test_a_stream_that_stalls_is_ended_by_its_handler() -> None:
    """With what it had given back."""
    stream = Stream(len(DATA))
    with pytest.raises(DeadlineError):
        stream.receive(chunks_of(DATA, 1000, 5.0), idle_s=0.2)
    assert stream.budget.used_bytes == 0


def test_a_stream_is_held_up_by_a_thread_that_is_slow_and_by_memory_that_is_short() -> None:
    """Two batches wait at most; a chunk for which there is never memory is an error."""
    stream = Stream(8 * BATCH_BYTES)
    held: list[int] = []

    async def watched() -> AsyncIterator[UploadBytes]:
        async for chunk in chunks_of(bytes(8 * BATCH_BYTES), BATCH_BYTES // 2):
            held.append(stream.budget.used_bytes)
            yield chunk

    late(stream._thread.start, 0.3)
    stream._thread, started = threading.Thread(target=lambda: None), stream._thread
    assert stream.receive(watched()) == 8 * BATCH_BYTES
    started.join()
    assert max(held) <= 2 * BATCH_BYTES
    short = Stream(len(DATA), memory_bytes=100)
    with pytest.raises(LimitError, match="memory_bytes"):
        short.receive(chunks_of(DATA, 1000))


def test_a_stream_whose_worker_goes_away_gives_its_memory_back() -> None:
    """Also that of the chunk which waits until others are read."""
    stream = Stream(8 * BATCH_BYTES)

    async def main() -> None:
        one = StreamIn(stream, lambda upload: None, stream.budget, 10.0)  # type: ignore[arg-type]
        receiving = asyncio.create_task(one.receive(chunks_of(bytes(8 * BATCH_BYTES), BATCH_BYTES)))
        while stream.budget.used_bytes <= 2 * BATCH_BYTES:
            await asyncio.sleep(0.01)
        receiving.cancel()  # as gRPC does
        await asyncio.wait([receiving])
        stream.upload.intake.give_up()

    asyncio.run(main())
    assert stream.budget.used_bytes == 0


def test_a_stream_whose_upload_wants_no_more_ends_early() -> None:
    """As where there is no room: what became of it is for CommitStore to say."""
    stream = Stream(len(DATA))

    async def closed_midway() -> AsyncIterator[UploadBytes]:
        async for chunk in chunks_of(DATA, 1000):
            if stream.upload.intake.received_bytes > 2000:
                stream.upload.intake.close()
            yield chunk
            await asyncio.sleep(0.01)

    assert 2000 < stream.receive(closed_midway()) < len(DATA)
    wait_until(lambda: stream.budget.used_bytes == 0, 60, lambda: f"{stream.budget.used_bytes} bytes")
