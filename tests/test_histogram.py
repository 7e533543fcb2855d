"""Counts by upper bounds."""

from __future__ import annotations

from kvstore.core.histogram import Histogram


def test_a_value_counts_under_the_first_bound_that_holds_it() -> None:
    """A bound holds itself; above all bounds is a count of its own."""
    histogram = Histogram((1.0, 5.0))
    for value in (0.0, 1.0, 1.5, 5.0, 5.1, 100.0):
        histogram.observe(value)
    found = histogram.snapshot()
    assert (found.bounds, found.counts, round(found.total, 6)) == ((1.0, 5.0), (2, 2, 2), 112.6)


def test_a_clock_that_was_set_back_measures_nothing() -> None:
    """No time is below zero."""
    histogram = Histogram((1.0,))
    histogram.observe(-5.0)
    assert histogram.snapshot().counts == (1, 0) and histogram.snapshot().total == 0
