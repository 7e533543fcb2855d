"""Kills and power cuts: a sample of the points; `make faults` takes all. Both find the bugs that they are there for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import cuts, kills
from tests.faults.__main__ import first_find
from tests.faults.bugs import BUGS, CUT, KILL
from tests.faults.table import spread
from tests.faults.workload import SCRIPTS

KILLS_EACH, CUTS_EACH = 8, 8
needs_kills = pytest.mark.skipif(bool(kills.missing()), reason=f"NOT RUN: {kills.missing()}")
needs_cuts = pytest.mark.skipif(bool(cuts.missing()), reason=f"NOT RUN: {cuts.missing()}")


@needs_kills
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_kill_at_any_call_breaks_no_promise(tmp_path: Path, script: str) -> None:
    """What was acknowledged is there, what is served is right, nothing is left over, the next start works."""
    harness = kills.Kills(tmp_path / "kills")
    points = harness.points(script)
    assert len(points) >= 20
    assert [wrong for point in spread(points, KILLS_EACH) for wrong in harness.strike(point)] == []


@needs_kills
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_kill_while_files_are_synced_beside_others_breaks_no_promise(tmp_path: Path, script: str) -> None:
    """The same with the threads that the engine has: one file is being written and two wait for the disk."""
    harness = kills.Kills(tmp_path / "kills")
    points = harness.seam_points(script)
    assert len(points) >= 10 or script == "repair offline"
    assert [wrong for point in spread(points, KILLS_EACH) for wrong in harness.strike_seam(point)] == []


@needs_cuts
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_power_cut_at_any_point_breaks_no_promise(tmp_path: Path, script: str) -> None:
    """With durability commit what was acknowledged is there; with none what is there is right."""
    harness = cuts.Cuts(tmp_path / "cuts")
    points = harness.points(script)
    assert [wrong for cut in spread(points, CUTS_EACH) for wrong in harness.strike(cut)] == []


@needs_kills
@pytest.mark.parametrize("bug", [name for name, bug in BUGS.items() if KILL in bug.found_by])
def test_kills_find_what_is_done_in_the_wrong_order(tmp_path: Path, bug: str) -> None:
    """A harness that finds nothing in a broken store would prove nothing about a sound one."""
    assert first_find(kills.Kills(tmp_path / "kills"), bug)


@needs_cuts
@pytest.mark.parametrize("bug", [name for name, bug in BUGS.items() if CUT in bug.found_by])
def test_power_cuts_find_what_is_not_synced(tmp_path: Path, bug: str) -> None:
    """Kills cannot: the page cache survives them."""
    assert first_find(cuts.Cuts(tmp_path / "cuts"), bug)
