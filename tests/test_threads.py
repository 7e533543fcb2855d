"""server/threads.py: the one table of the daemon's threads."""

from __future__ import annotations

import ast
import asyncio
import re
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

import kvstore.server
from kvstore.errors import CorruptDataError
from kvstore.server import daemon
from kvstore.server.threads import Pool, Threads

SERVER = Path(kvstore.server.__file__).parent
# What makes a thread, or gives work to one that the table does not know.
MAKERS = {"ThreadPoolExecutor", "Thread", "Timer", "to_thread", "run_in_executor"}


@pytest.fixture
def threads() -> Iterator[Threads]:
    """All of them."""
    made = Threads()
    yield made
    made.close()


def pools(threads: Threads) -> dict[str, Pool]:
    """The pools of the table."""
    return {name: pool for name, pool in vars(threads).items() if isinstance(pool, Pool)}


def test_no_thread_is_made_outside_the_table() -> None:
    """Only the table makes pools, and the lane its threads."""
    found = {
        path.name
        for path in SERVER.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Name) and node.id in MAKERS)
        or (isinstance(node, ast.Attribute) and node.attr in MAKERS)
    }
    assert found == {"threads.py", "lane.py"}


def test_the_table_of_the_documents_is_the_table(threads: Threads) -> None:
    """docs/architecture.md: every pool, with how many threads it has."""
    text = (SERVER.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    told = {name: int(count) for name, count in re.findall(r"^\| `(\w+)` \| (\d+)", text, re.MULTILINE)}
    assert told == {name: pool._threads for name, pool in pools(threads).items()}


def test_every_pool_runs_its_work_on_threads_of_its_name(threads: Threads) -> None:
    """So that a stack dump says what a thread is for."""

    async def names() -> dict[str, str]:
        return {name: await pool(lambda: threading.current_thread().name) for name, pool in pools(threads).items()}

    assert all(thread.startswith(f"kvstore-{name}_") for name, thread in asyncio.run(names()).items())
    assert len(pools(threads)) == 16


def test_a_pool_that_is_full_holds_up_no_other(threads: Threads) -> None:
    """Whatever stands still on the threads of one kind of work, every other kind goes on."""

    async def others_go_on(name: str) -> None:
        end = threading.Event()
        stuck = [asyncio.ensure_future(pools(threads)[name](end.wait)) for _ in range(9)]
        await asyncio.sleep(0.01)
        for other, pool in pools(threads).items():
            if other != name:
                assert await asyncio.wait_for(pool(lambda: 1), 60) == 1
        assert not any(each.done() for each in stuck)
        end.set()
        await asyncio.gather(*stuck)

    for name in pools(threads):
        asyncio.run(others_go_on(name))


def cancelled(start: Callable[[Pool], Awaitable[object]], *, pool: Pool) -> None:
    """Give work to a pool that is busy, and cancel the caller before the work has begun."""

    async def main() -> None:
        end = threading.Event()
        busy = asyncio.ensure_future(pool(end.wait))
        await asyncio.sleep(0.01)
        waiting = asyncio.ensure_future(start(pool))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.sleep(0)
        end.set()
        await busy
        await pool(lambda: None)

    asyncio.run(main())


def test_work_that_must_be_finished_outlives_its_caller(threads: Threads) -> None:
    """The end of an upload, when the worker that asked for it is gone; what is only asked for is dropped."""
    done: list[str] = []
    cancelled(lambda pool: pool.finish(done.append, "finish"), pool=threads.release)
    cancelled(lambda pool: pool(done.append, "call"), pool=threads.release)
    assert done == ["finish"]


def test_callers_of_work_that_a_closing_pool_drops_are_ended() -> None:
    """They would wait for ever: no thread comes to it any more. What runs gives its answer."""

    async def main() -> tuple[bool, str]:
        pool, begun, end = Pool("read", 1), threading.Event(), threading.Event()
        running, waiting = pool(lambda: begun.set() or end.wait()), pool(lambda: "never")
        assert begun.wait(60)
        threading.Timer(0.05, end.set).start()
        pool.close()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(waiting, 60)
        return await asyncio.wait_for(running, 60), f"{pool.waiting} wait"

    assert asyncio.run(main()) == (True, "0 wait")


def test_a_thread_that_the_system_refuses_leaves_no_work_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller is told. Where other threads run, the work waits for one of them."""
    done: list[str] = []

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        pool, end = Pool("read", 2), threading.Event()
        with monkeypatch.context() as none_left:
            none_left.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError):
                pool(done.append, "refused")
        running = pool(end.wait)
        with monkeypatch.context() as none_left:
            none_left.setattr(threading.Thread, "start", refuse)
            waiting = pool(done.append, "waits")
        end.set()
        await asyncio.wait_for(asyncio.gather(running, waiting), 60)
        pool.close()

    asyncio.run(main())
    assert done == ["waits"]


def test_a_thread_without_work_keeps_nothing_of_the_last_alive() -> None:
    """The tokens of a prompt, and the rows of its match."""

    class Held:
        """What work returns and takes."""

    async def main() -> None:
        pool = Pool("read", 1)
        kept = weakref.ref(await pool(lambda held: held, Held()))
        await asyncio.sleep(0)
        while not pool._idle:
            await asyncio.sleep(0.001)
        assert kept() is None
        pool.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_whoever_waits_for_what_was_posted_finds_it_done() -> None:
    """Of what was posted before, failures too; and at once where nothing was."""
    done: list[int] = []

    def fail() -> None:
        raise OSError("the disk is away")

    async def main() -> None:
        pool = Pool("note", 1)
        assert not await pool.settled(60.0)
        for work in (lambda: time.sleep(0.05), fail, lambda: done.append(1)):
            pool.post(work)
        assert not await pool.settled(60.0)
        assert done == [1]
        pool.close()

    asyncio.run(main())


def test_a_wait_for_what_was_posted_ends_at_its_limit() -> None:
    """It says how much is not done. That goes on."""

    async def main() -> None:
        pool, end = Pool("note", 1), threading.Event()
        pool.post(end.wait)
        early = await pool.settled(0.01)
        end.set()
        assert (early, await pool.settled(60.0), await pool.settled(0.0)) == (1, 0, 0)
        pool.close()

    asyncio.run(main())


@pytest.mark.parametrize("name", ["read", "note", "stream", "decode", "plan", "release", "check", "evict", "remote"])
def test_what_waits_for_a_thread_is_told_by_pool(threads: Threads, name: str) -> None:
    """Where no thread is free; the work that has one does not count."""

    async def main() -> None:
        end, pool = threading.Event(), pools(threads)[name]
        stuck = [asyncio.ensure_future(pool(end.wait)) for _ in range(pool._threads + 2)]
        told = threads.waiting()
        end.set()
        await asyncio.gather(*stuck)
        assert told == {name: 2} and threads.waiting() == {}

    asyncio.run(main())


def test_what_is_posted_for_later_is_done_then_or_when_somebody_waits_and_in_order() -> None:
    """Until then it counts as waiting, so that a limit on what waits holds for it, too."""
    done: list[int] = []

    async def main() -> None:
        pool = Pool("note", 1)
        for number in range(3):
            pool.post_later(600.0, done.append, number)
        await asyncio.sleep(0.01)
        assert not done and pool.waiting == 2
        assert not await pool.settled(60.0)
        assert done == [0, 1, 2] and pool.waiting == 0
        pool.post_later(0.001, done.append, 3)
        while len(done) < 4:
            await asyncio.sleep(0.001)
        pool.close()
        pool.post_later(0.001, done.append, 4)
        await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), 60))
    assert done == [0, 1, 2, 3]


def test_what_was_posted_is_done_before_the_pool_closes() -> None:
    """Uploads that were given up at the last moment leave no files."""
    done: list[int] = []

    async def main() -> None:
        threads = Threads()
        end = threading.Event()
        for work in (end.wait, *[lambda number=number: done.append(number) for number in range(5)]):
            threads.release.post(work)
        await asyncio.sleep(0.01)
        end.set()
        threads.close()
        threads.release.post(done.append, 99)
        threads.close()

    asyncio.run(main())
    assert done == list(range(5))


def test_closing_the_table_closes_every_pool() -> None:
    """The engine is closed next, and no thread may use it then."""
    threads = Threads()
    threads.close()
    assert [name for name, pool in pools(threads).items() if not pool.is_closed] == []


def test_an_error_of_what_was_posted_is_logged(threads: Threads, caplog: pytest.LogCaptureFixture) -> None:
    """No caller hears of it."""

    def fail() -> None:
        raise OSError("the disk is away")

    async def main() -> None:
        threads.release.post(fail)
        await threads.release(lambda: None)
        await asyncio.sleep(0.01)

    asyncio.run(main())
    assert "the disk is away" in caplog.text


@pytest.mark.parametrize("error", [OSError("full"), CorruptDataError("a row")])
def test_no_error_of_the_store_ends_what_is_done_every_second(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, and the work is tried again."""
    monkeypatch.setattr(daemon, "UPKEEP_EVERY_S", 0)
    tries = []

    async def fail_once() -> None:
        tries.append(len(tries))
        if len(tries) == 1:
            raise error

    async def main() -> None:
        again = asyncio.create_task(daemon.every_second(fail_once))
        while len(tries) < 3 and not again.done():
            await asyncio.sleep(0)
        again.cancel()

    asyncio.run(main())
    assert len(tries) == 3
    assert "upkeep failed" in caplog.text
