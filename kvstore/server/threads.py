"""Every thread of the daemon, and what may run on each.

The event loop only awaits: it touches no disk, no index and no lock that another thread holds over I/O. Everything that
may block is given to one of these pools. Work shares a thread only with work that may wait for the same things, so that
nothing short waits behind something long.

Two rooms below have threads of their own. A request that stores writes and syncs its blobs on two threads that end with
it (`kvstore/blobs/write_behind.py`). The remote tier has one that pushes and those that make its requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias, TypeVar

from kvstore.core.thread_priority import lower_thread_priority
from kvstore.server.lane import Lane

T = TypeVar("T")
_Work: TypeAlias = tuple[asyncio.Future[Any], Callable[..., Any], tuple[object, ...]]
log = logging.getLogger(__name__)


class Pool:
    """Threads for one kind of work, first come, first served. Call it on the event loop.

    Not a ThreadPoolExecutor: its futures, locks and callbacks come on top of asyncio's own. Its threads also do more
    after a result is there, while the event loop waits for the GIL.
    """

    def __init__(self, name: str, threads: int, *, background: bool = False) -> None:
        """`background`: its threads run at a lower priority than everything that somebody waits for."""
        self.name = name
        self._threads = threads
        self._background = background
        self._callers = 0
        self._work: SimpleQueue[_Work | None] = SimpleQueue()  # None ends a thread
        self._started: list[threading.Thread] = []
        self._idle: deque[None] = deque()  # one for each thread that has ended its work and that no call counts on
        self._posted: set[asyncio.Future[Any]] = set()
        self._later: list[tuple[Callable[..., object], tuple[object, ...]]] = []
        self._is_closed = False

    def __call__(self, work: Callable[..., T], *args: object) -> asyncio.Future[T]:
        """Run `work(*args)`; its result. If the caller is cancelled, work that has not begun is dropped."""
        if self._is_closed:
            raise RuntimeError(f"the threads of {self.name} have ended")
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if self._idle:
            self._idle.pop()
        elif len(self._started) < self._threads:
            self._start()
        self._work.put((answer, work, args))
        self._callers += 1
        answer.add_done_callback(self._left)
        return answer

    def _start(self) -> None:
        """Start one more thread. RuntimeError when the system refuses it and the pool has no other.

        It is a daemon thread, so the process can exit without closing the pool.
        """
        name = f"kvstore-{self.name}_{len(self._started)}"
        thread = threading.Thread(target=self._serve, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            if not self._started:
                raise
        else:
            self._started.append(thread)

    def _serve(self) -> None:
        """What each thread does."""
        if self._background:
            lower_thread_priority()
        while (item := self._work.get()) is not None:
            _run(*item)
            del item  # a thread that waits keeps nothing alive
            self._idle.append(None)

    def _left(self, _: object) -> None:
        self._callers -= 1

    @property
    def is_closed(self) -> bool:
        """Whether it takes no work any more."""
        return self._is_closed

    @property
    def waiting(self) -> int:
        """Callers whose work has not begun, since all threads are taken."""
        return max(0, self._callers + len(self._later) - self._threads)

    def finish(self, work: Callable[..., T], *args: object) -> asyncio.Future[T]:
        """As a call, but the work is done even if the caller is cancelled before it has begun."""
        return asyncio.shield(self(work, *args))

    def post(self, work: Callable[..., object], *args: object) -> None:
        """Have `work(*args)` done later, without waiting. Errors are logged. Dropped once the pool is closed."""
        if self._is_closed:
            return
        posted = self(work, *args)
        self._posted.add(posted)  # the loop itself holds tasks only weakly
        posted.add_done_callback(self._ended)

    def _ended(self, posted: asyncio.Future[Any]) -> None:
        self._posted.discard(posted)
        if not posted.cancelled() and (error := posted.exception()) is not None:
            log.warning("%s: %s", self.name, error, exc_info=error)

    def post_later(self, delay_s: float, work: Callable[..., object], *args: object) -> None:
        """As `post`, after this time, or as soon as somebody waits for it."""
        if not self._later:
            asyncio.get_running_loop().call_later(delay_s, self._post_all)
        self._later.append((work, args))

    def _post_all(self) -> None:
        later, self._later = self._later, []
        for work, args in later:
            self.post(work, *args)

    async def settled(self, timeout_s: float) -> int:
        """Wait until everything posted before is done, at most `timeout_s`. Returns how many pieces are not."""
        self._post_all()
        return len((await asyncio.wait(self._posted, timeout=timeout_s))[1]) if self._posted else 0

    def close(self, *, drop: bool = True) -> None:
        """Finish what runs. What waits is dropped, or with `drop=False` finished, too. Idempotent."""
        self._is_closed = True
        with contextlib.suppress(Empty):
            while drop and (dropped := self._work.get_nowait()) is not None:
                _tell(dropped[0], dropped[0].cancel)  # otherwise its caller never returns
        for _ in self._started:
            self._work.put(None)
        while self._started:
            self._started.pop().join()


def _run(answer: asyncio.Future[T], work: Callable[..., T], args: tuple[object, ...]) -> None:
    """Do a piece of work on this thread, and give its caller the result."""
    if answer.cancelled():
        return
    try:
        result = work(*args)
    except BaseException as error:  # noqa: BLE001  # raised where the caller waits
        _tell(answer, answer.set_exception, error)
    else:
        _tell(answer, answer.set_result, result)


def _tell(answer: asyncio.Future[Any], end: Callable[..., object], *value: object) -> None:
    """End an answer, from any thread."""
    with contextlib.suppress(RuntimeError):  # the loop has ended
        answer.get_loop().call_soon_threadsafe(_settle, answer, end, *value)


def _settle(answer: asyncio.Future[Any], result: Callable[..., object], *value: object) -> None:
    """Give an answer to its caller, unless it has gone away."""
    if not answer.done():
        result(*value)


class Threads:
    """The table. `close` ends all of them; until then every pool may be called on the event loop."""

    def __init__(
        self,
        start: Callable[[], None] | None = None,
        idle: Callable[[], None] | None = None,
        *,
        two_threads: bool = False,
        uploads_max: int = 64,
    ) -> None:
        """`start`, `idle` and `two_threads` are the lane's."""
        # Matches and plans of fetches: index and sizes of blobs. Never waits for a writer of the index.
        self.read = Pool("read", 4)
        # What is remembered of a request, once its answer is under way. One thread: a fetch comes after its match.
        self.note = Pool("note", 1)
        # A batch of a stream as it is stored, and a block that a worker reports as damaged: waits for the disk.
        self.stream = Pool("stream", 4)
        # A batch of a dense stream: waits for the disk and for the lane, most of the time for the lane.
        self.decode = Pool("decode", 8)
        # BeginStore: may wait for a writer of the index.
        self.plan = Pool("plan", 2)
        # A thread for each upload whose bytes come or are committed, from its first byte to its end: receives, encodes
        # and writes a block at a time. It waits for its worker, for memory, for room on the disk and for the lane, so
        # there are as many as uploads; what they hold of memory_bytes is bounded (`StorePath`).
        self.write = Pool("write", uploads_max, background=True)
        # The end of uploads and leases: unlinks.
        self.release = Pool("release", 1)
        # Once a second: budget, free floor, deletions to settle, idle uploads, displaced directory, connections.
        self.care = Pool("care", 1)
        # Reads blobs from end to end: the scrub and `check`.
        self.check = Pool("check", 1)
        # Evictions that an admin asks for, and `kvstore set`: a lower limit evicts.
        self.evict = Pool("evict", 1)
        # Export, import and bases, a piece at a time: one thread, so that pieces of one stay in order and none is
        # closed while it works. It waits for the disk.
        self.pack = Pool("pack", 1, background=True)
        # Re-encodes while nothing else is done; gives way between pieces of device work.
        self.reencode = Pool("reencode", 1, background=True)
        # Reads of the remote tier, and what was read stored here. Each read ends by its request's deadline, so a share
        # that hangs keeps threads of the tier, and none of these.
        self.remote = Pool("remote", 4)
        # Once a second: whether the remote tier serves, and what is to be pushed to it. The tier itself has the thread
        # that pushes.
        self.watch = Pool("watch", 1, background=True)
        # All other admin calls, credential files that changed, and the start and stop of the daemon.
        self.admin = Pool("admin", 1)
        # The event loop that scrapers are answered on, where there is one.
        self.metrics = Pool("metrics", 1, background=True)
        # Everything that touches the device: pieces of about 50 ms, fetches before stores; a store that waits ages.
        self.lane = Lane(start, idle, two_threads=two_threads)

    def waiting(self) -> dict[str, int]:
        """Callers that wait for a thread, by pool; pools without any are left out. On the event loop."""
        asked = (self.read, self.note, self.stream, self.decode, self.plan, self.write, self.release)
        pools = (*asked, self.check, self.evict, self.remote)
        return {pool.name: pool.waiting for pool in pools if pool.waiting}

    def close(self) -> None:
        """Finish what runs and every release, drop what else waits. Idempotent. Call it before the engine is closed."""
        for pool in (self.write, self.remote, self.plan, self.decode, self.stream, self.read, self.note):
            pool.close()
        for pool in (self.watch, self.reencode, self.metrics, self.pack, self.evict, self.check, self.care, self.admin):
            pool.close()
        self.release.close(drop=False)
        self.lane.close()
