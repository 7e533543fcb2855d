"""Histories of calls that may end anywhere, against a model; `make faults` takes more of them."""

from __future__ import annotations

from pathlib import Path

from hypothesis import Phase

from tests.faults import calls


def test_calls_that_end_anywhere_leave_what_was_acknowledged_and_nothing_else(tmp_path: Path) -> None:
    """Never wrong rows, never an upload, a staged or an open file too many."""
    calls.run(tmp_path, examples=12, steps=25, phases=(Phase.generate, Phase.shrink))


def test_histories_find_an_abort_that_does_nothing(tmp_path: Path) -> None:
    """Of the bugs in `calls.BUGS` one; `python -m tests.faults bugs` tries them all."""
    assert calls.first_find(tmp_path / "bug", "AbortStore does nothing")
