"""Thread priority: what nobody waits for runs at a lower priority than what somebody does."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from unittest import mock

import pytest

from kvstore.client.background import Background
from kvstore.client.provenance import HeldPrefixes
from kvstore.client.results import SessionStats
from kvstore.core.thread_priority import BACKGROUND_NICE, lower_thread_priority
from kvstore.server.threads import Pool, Threads

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the niceness of a thread is what Linux has")


def niceness() -> int:
    """Of the calling thread."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def lowered() -> int:
    """What the calling thread's niceness would become, from what this process runs at."""
    return max(niceness(), BACKGROUND_NICE)


def test_the_thread_that_sends_stores_gives_way_to_the_others() -> None:
    """The sender's thread is nice; the one that submits stays as it was."""
    before, seen = niceness(), list[int]()
    uploader = mock.Mock(report=lambda *_: seen.append(niceness()))
    connection = mock.MagicMock(**{"health.absence.return_value": None})
    background = Background(mock.Mock(), connection, uploader, HeldPrefixes(), SessionStats())
    background.report(b"", "")
    assert background.flush(60)
    background.close(10)
    assert seen == [lowered()]
    assert niceness() == before


def test_of_the_daemons_threads_those_give_way_for_which_nobody_waits() -> None:
    """Reading, planning, decoding, care and what admins ask for keep their priority."""
    low = {"write", "pack", "reencode", "watch", "metrics"}

    async def levels(threads: Threads) -> dict[str, int]:
        return {pool.name: await pool(niceness) for pool in vars(threads).values() if isinstance(pool, Pool)}

    threads = Threads()
    try:
        found = asyncio.run(levels(threads))
    finally:
        threads.close()
    assert found == {name: lowered() if name in low else niceness() for name in found}
    assert low < found.keys()


def test_a_thread_that_is_nicer_already_stays_so() -> None:
    """A worker that was started with `nice -n 15` is not made to compete harder."""
    program = (
        "import os, threading; from kvstore.core import thread_priority; thread_priority.lower_thread_priority(); "
        "print(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))"
    )
    command = ["nice", "-n", "15", sys.executable, "-c", program]
    here = os.getpriority(os.PRIO_PROCESS, 0)
    assert int(subprocess.run(command, check=True, capture_output=True).stdout) >= min(19, here + 15)


def test_a_system_that_refuses_leaves_the_thread_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """No error comes out of it: a store goes on at the priority that it has."""

    def refuse(*_: object) -> None:
        raise PermissionError

    before = niceness()
    monkeypatch.setattr(os, "setpriority", refuse)
    lower_thread_priority()
    assert niceness() == before
