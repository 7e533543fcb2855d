"""What every test starts with."""

from __future__ import annotations

import atexit
import functools
import gc
import logging
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import hypothesis
import pytest

from kvstore.client import background, channel, client, fetch, health, provenance, receiver, uploader
from tests.support.hangs import TELLS_STACKS, ending_hung_processes

# An example that takes long, or data that comes slowly, says how busy the machine is and nothing of the code. A change
# is tried with the same examples every time: what only other examples find is not its fault. `explore` looks for them.
BUSY = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("same", BUSY, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", BUSY, derandomize=False, print_blob=True)
hypothesis.settings.load_profile("same")


# Tests press Ctrl-C in processes that they start, which would ignore it as this one does under nohup.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What tests leave queued is not worth a line after their summary.
atexit.unregister(background.tell_lost)

# Before any process is started.
os.environ[TELLS_STACKS] = "1"


def pytest_collection_finish() -> None:
    """Thousands of tests stay in memory: the collector need not look through them while each one runs."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Of a test and its fixtures: what hangs in a process that they started fails the test, with its stacks."""
    with ending_hung_processes():
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def patient_clients() -> Iterator[None]:
    """Verbs and stores of this process wait for a daemon as long as a busy machine may hold it up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel, "ATTEMPT_S", 30.0)
        patch.setattr(health, "ASK_S", 30.0)
        for name in ("CONNECT_S", "QUICK_S"):
            patch.setattr(client, name, 30.0)
        for name in ("CONNECT_S", "BEGIN_S", "ACCEPTED_S"):
            patch.setattr(uploader, name, 30.0)
        yield


@pytest.fixture(autouse=True)
def own_provenance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of what came out of the store as a new process has it: tests share names of weights."""
    monkeypatch.setattr(provenance, "PROCESS", provenance.Provenance())


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    """What belongs to the whole process is left as it was: another test would fail, and only where it comes later."""
    before = _process_state()
    yield
    assert _process_state() == before


def _process_state() -> dict[str, object]:
    umask = os.umask(0o077)
    os.umask(umask)
    ours = logging.getLogger("kvstore")
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    return {"umask": umask, "level": ours.level, "propagate": ours.propagate, "signals": handlers, "cwd": os.getcwd()}


@pytest.fixture(params=["ahead", "in turn"])
def cancels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """Short streams are received on a thread, too, or none is; an item for each that was cancelled before its end.

    No thread is left.
    """
    seen: list[None] = []

    def noted(cancel: Callable[[], object]) -> None:
        seen.append(None)
        cancel()

    def made(messages: Any, nbytes: int, cancel: Callable[[], object]) -> receiver.ReadAhead:
        return receiver.ReadAhead(messages, nbytes, functools.partial(noted, cancel))

    monkeypatch.setattr(receiver, "AHEAD_BYTES_MIN", 0 if request.param == "ahead" else 1 << 62)
    monkeypatch.setattr(fetch, "ReadAhead", made)
    yield seen
    assert not [thread for thread in threading.enumerate() if thread.name == "kvstore-receive"]
