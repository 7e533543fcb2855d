"""What a harness did and found, as the rows of one table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
COLUMNS = ("fault", "how", "runs", "wrong bytes served", "acknowledged-durable lost", "crashes", "recovery")


@dataclass
class Tally:
    """One row. `note` sorts what a run found wrong into the columns; `others` breaks a promise that has no column."""

    fault: str
    how: str
    recovery: str
    runs: int = 0
    wrong: int = 0
    lost: int = 0
    crashes: int = 0
    others: list[str] = field(default_factory=list)
    # Of a damaged blob the only copy is gone; that it is stored again is no answer to whether it was lost.
    can_keep: bool = True

    def note(self, what: object, found: Sequence[str]) -> None:
        """Count one run."""
        self.runs += 1
        self.wrong += any(each.startswith("wrong bytes") for each in found)
        self.lost += any(each.startswith("lost") for each in found)
        self.crashes += any(each.startswith(("crash", "refused, the next start", "the next start")) for each in found)
        self.others += [f"{what}: {each}" for each in found]

    def cells(self) -> tuple[str, ...]:
        """As `COLUMNS`."""
        return (
            self.fault,
            self.how,
            f"{self.runs:,}",
            str(self.wrong),
            str(self.lost) if self.can_keep else "-",
            str(self.crashes),
            self.recovery,
        )


def spread(points: Sequence[Item], count: int) -> list[Item]:
    """So many of the points, evenly."""
    return list(points) if count >= len(points) else [points[at * len(points) // count] for at in range(count)]


def merged(tallies: Iterable[Tally]) -> list[Tally]:
    """Rows of one fault added up, in the order in which they came first."""
    rows: dict[str, Tally] = {}
    for one in tallies:
        into = rows.setdefault(one.fault, Tally(one.fault, one.how, one.recovery, can_keep=one.can_keep))
        into.runs += one.runs
        into.wrong += one.wrong
        into.lost += one.lost
        into.crashes += one.crashes
        into.others += one.others
    return list(rows.values())


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for people and for docs/operations.md."""
    cells = [list(columns), *map(list, rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def keep(path: Path, tallies: Iterable[Tally]) -> None:
    """Append rows to a file, one JSON object a line."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(one)) + "\n" for one in tallies)


def kept(path: Path) -> list[Tally]:
    """The rows of such a file."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Tally(**line) for line in lines]
