"""Notes of requests, and the stores that wait for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.core.blocks import Reason
from kvstore.engine import Match
from kvstore.server import notes
from kvstore.server.notes import Notes
from kvstore.server.threads import Pool


class Held:
    """Notes whose making is held until `go` is set. `kept` are the prompts that were noted in time."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.kept: list[str] = []
        self.pool = Pool("note", 1)
        self.notes = Notes(self.pool)
        self._why = SimpleNamespace(note=self._note)

    def _note(self, asked: str, *rest: Any, is_late: Callable[[], bool]) -> None:
        self.go.wait(60)
        if not is_late():
            self.kept.append(asked)

    def add(self, name: str) -> None:
        """A request of this name."""
        telemetry = SimpleNamespace(why=self._why)
        prompt = SimpleNamespace(asked=name, chain=None, identity=None, since=None, telemetry=telemetry)
        self.notes.add(prompt, Match(0, Reason.OK))  # type: ignore[arg-type]


def test_while_the_thread_is_stuck_only_the_first_store_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The notes before each are dropped. Once the thread is through with them, stores wait as before."""
    monkeypatch.setattr(notes, "NOTED_S", 0.01)
    waits: list[float] = []
    settled = Pool.settled

    async def counted(pool: Pool, timeout_s: float) -> int:
        waits.append(timeout_s)
        return await settled(pool, timeout_s)

    monkeypatch.setattr(Pool, "settled", counted)

    async def main() -> None:
        held = Held()
        for name in ("first", "second", "third"):
            held.add(name)
            await held.notes.await_before_store()
        assert len(waits) == 1
        held.add("of no store")
        held.go.set()
        assert not await settled(held.pool, 60)
        assert held.kept == ["of no store"]
        monkeypatch.setattr(notes, "NOTED_S", 60)
        held.add("later")
        await held.notes.await_before_store()
        assert len(waits) == 2 and held.kept == ["of no store", "later"]
        held.pool.close()

    asyncio.run(main())
