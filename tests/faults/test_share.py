"""A share of `make faults` scales every harness, and never to nothing."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.faults import __main__ as faults
from tests.faults import calls, cuts, disk, fuzz, hostile, kills, remote, remote_daemons, soak
from tests.faults.__main__ import SECTIONS, Share

TENTH, LEAST = Share(0.1), Share(1e-6)


def test_a_share_is_that_part_of_the_cases_evenly_spread() -> None:
    """In order, without one twice; all of them where no share is given."""
    assert TENTH.of(range(1000)) == list(range(0, 1000, 10))
    assert Share().of(range(1000)) == list(range(1000))
    assert Share(0.5).of("abcd") == ["a", "c"]


@pytest.mark.parametrize("full", [1, 2, 9, 10_000])
def test_a_share_is_never_no_case(full: int) -> None:
    """But of nothing it is nothing."""
    assert len(LEAST.of(range(full))) == LEAST.count(full) == 1
    assert LEAST.of([]) == []


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "nan", "", "1/10"])
def test_what_is_no_share_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the usage and exit code 2, before anything runs."""
    monkeypatch.setattr("sys.argv", ["faults", "full", "--share", text])
    with pytest.raises(SystemExit, match="2"):
        faults.main()


class Harness:
    """Stands in for kills, cuts and errors: 100 points a script, and strikes that only count."""

    def __init__(self, folder: Path, *_: object) -> None:
        self.struck = 0

    def points(self, *script: str, calls: object = None) -> list[int]:
        """Of a script, or of what reads in it."""
        return list(range(100))

    seam_points = points

    def strike(self, point: int) -> list[str]:
        """Nothing is found."""
        return []

    strike_seam = strike_folder = strike

    def folder_points(self) -> int:
        """Of the remote store."""
        return 100

    def requests(self, verb: str) -> int:
        """Of the remote store."""
        return 100

    def strike_bucket(self, verb: str, point: int) -> list[str]:
        """Nothing is found."""
        return []

    def strike_error(self, point: int, error: str) -> list[str]:
        """Nothing is found."""
        return []


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every harness does nothing and says how much it was asked to do; damage is so quick that it is real."""
    for module, name in ((kills, "Kills"), (cuts, "Cuts"), (disk, "Errors"), (remote, "Kills")):
        monkeypatch.setattr(module, name, Harness)
    for name in ("seaweed", "FaultProxy"):
        monkeypatch.setattr(remote, name, lambda _: nullcontext())
    monkeypatch.setattr(remote, "keeps_contract", lambda _: ())
    monkeypatch.setattr(remote, "races", lambda _, count: ((number, []) for number in range(count)))
    monkeypatch.setattr(remote, "strike_link", lambda *_: [])
    monkeypatch.setattr(remote, "new_place", lambda _: ())
    monkeypatch.setattr(remote_daemons, "Pair", lambda *_: nullcontext(SimpleNamespace(by_hand=list)))
    monkeypatch.setattr(remote_daemons, "strikes", lambda _, count: ((number, []) for number in range(count)))
    monkeypatch.setattr(disk, "full_disk", lambda *_: [])
    monkeypatch.setattr(hostile, "run", lambda _, count: SimpleNamespace(calls=count, wrong=0, faults=[]))
    monkeypatch.setattr(calls, "run", lambda *_: None)
    monkeypatch.setattr(fuzz, "fuzz", lambda _name, _folder, seconds: (seconds, []))

    def soaked(_: Path, minutes: float, leak: str) -> Any:
        return soak.Report(calls=round(minutes * 1000))

    monkeypatch.setattr(soak, "run", soaked)


def runs(section: str, folder: Path, share: Share) -> int:
    """How much a section does with a share."""
    folder.mkdir()
    _, run = SECTIONS[section]
    return sum(tally.runs for tally in run(folder, share))


@pytest.mark.parametrize("section", [name for name in SECTIONS if name not in ("blobs", "indexes")])
def test_a_tenth_of_every_section_is_a_tenth_of_its_runs(counting: None, tmp_path: Path, section: str) -> None:
    """Of its points, its calls, its examples and its time."""
    full, tenth = runs(section, tmp_path / "full", Share()), runs(section, tmp_path / "tenth", TENTH)
    assert full >= 50
    assert 0.08 * full <= tenth <= 0.12 * full


@pytest.mark.parametrize("section", SECTIONS)
def test_the_least_share_of_every_section_runs_something(counting: None, tmp_path: Path, section: str) -> None:
    """So that a table of zeros never looks like a promise kept."""
    assert runs(section, tmp_path / "least", LEAST) >= 1


def test_seeded_bugs_are_a_share_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At least one of each kind; one that is not found fails the run."""
    tried: list[str] = []
    monkeypatch.setattr(faults, "first_find", lambda _, bug: tried.append(bug) or "found")
    monkeypatch.setattr(calls, "first_find", lambda _, bug: tried.append(bug) or "found")
    assert faults.prove(tmp_path, LEAST)
    assert len(set(tried)) == 2
    monkeypatch.setattr(calls, "first_find", lambda *_: "")
    assert not faults.prove(tmp_path, LEAST)
