"""What every test starts with."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest

from kvstore.client import fetch, provenance, receiver

# An example that takes long, or data that comes slowly, says how busy the machine is and nothing of the code. A change
# is tried with the same examples every time: what only other examples find is not its fault. `explore` looks for them.
BUSY = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("same", BUSY, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", BUSY, derandomize=False, print_blob=True)
hypothesis.settings.load_profile("same")


def pytest_collection_finish() -> None:
    """Thousands of tests stay in memory: the collector need not look through them while each one runs."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_provenance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of what came out of the store as a new process has it: tests share names of weights."""
    monkeypatch.setattr(provenance, "PROCESS", provenance.Provenance())


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
