"""What is believed of a link after requests over it were timed."""

from __future__ import annotations

import math

import pytest

from kvstore.remote.link import BYTES_PER_S, HALF_LIFE_S, LATENCY_S, Link

MB = 1_000_000


def taught(latency_s: float, bytes_per_s: float, count: int = 12) -> tuple[Link, list[float]]:
    """A link over which this was measured, and its clock."""
    now = [0.0]
    link = Link(lambda: now[0])
    for nbytes in [0, 20 * MB] * count:
        link.measured(nbytes, latency_s + nbytes / bytes_per_s)
    return link, now


@pytest.mark.parametrize("latency_s", [1e-4, 2e-3, 0.08])
@pytest.mark.parametrize("rate", [3e6, 30e6, 110e6, 1.2e9])
def test_a_steady_link_is_learned(latency_s: float, rate: float) -> None:
    """Both of its terms, from a few requests, whatever was guessed."""
    link, _ = taught(latency_s, rate)
    assert link.speed.latency_s == pytest.approx(latency_s, rel=0.05)
    assert link.speed.bytes_per_s == pytest.approx(rate, rel=0.25)
    assert link.seconds(50 * MB) == pytest.approx(2 * latency_s + 50 * MB / rate, rel=0.25)


def test_the_first_measurement_counts_in_full() -> None:
    """A slow link is known to be slow after one read."""
    link, _ = taught(LATENCY_S, 3e6, count=1)
    assert link.speed.bytes_per_s == pytest.approx(3e6, rel=0.1)


def test_what_was_slow_is_tried_again_and_what_was_fast_is_believed() -> None:
    """Nothing is fetched over a link that is believed slow, so nothing would ever be measured."""
    slow, now = taught(0.5, 1e6)
    now[0] = 40 * HALF_LIFE_S
    assert slow.speed.bytes_per_s == pytest.approx(BYTES_PER_S, rel=0.01)
    assert slow.speed.latency_s == pytest.approx(LATENCY_S, rel=0.01)
    fast, now = taught(1e-4, 1e9)
    now[0] = 40 * HALF_LIFE_S
    assert fast.speed.bytes_per_s == pytest.approx(1e9, rel=0.25)


def test_a_read_that_was_given_up_never_makes_a_link_look_faster() -> None:
    """It says at most how slow it is."""
    link, _ = taught(LATENCY_S, 10e6)
    before = link.speed
    link.measured(100 * MB, 0.5, given_up=True)
    assert link.speed == before
    link.measured(1 * MB, 5.0, given_up=True)
    assert link.speed.bytes_per_s < before.bytes_per_s


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_times_that_cannot_be_are_ignored(seconds: float) -> None:
    """A clock may do anything."""
    link = Link()
    before = link.speed
    link.measured(20 * MB, seconds)
    link.measured(0, seconds)
    assert link.speed.bytes_per_s == before.bytes_per_s
