"""The table of the entries that were set last."""

from __future__ import annotations

from kvstore.core.bounded import Bounded


def test_what_is_set_again_outlives_what_was_set_before() -> None:
    """The oldest goes when there is one too many; reading makes nothing newer."""
    table: Bounded[str, int] = Bounded(2)
    for key in ("a", "b", "a"):
        table[key] = len(table)
    assert table["b"] == 1
    table["c"] = 3
    assert list(table.items()) == [("a", 2), ("c", 3)]
