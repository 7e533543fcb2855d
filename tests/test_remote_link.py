"""What is believed of a link, and what is fetched over it: never what would be slower than computing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.remote.link import BYTES_PER_S, HALF_LIFE_S, LATENCY_S, WORTH_SHARE, Link, Prefix, worthwhile

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


@given(
    sizes=st.lists(st.integers(1, 60 * MB), min_size=1, max_size=40),
    latency_s=st.floats(1e-4, 0.2),
    rate=st.floats(1e6, 2e9),
    prefill=st.floats(50, 20_000),
    held=st.integers(0, 4000),
    limit_s=st.floats(0.05, 10),
)
@settings(max_examples=300, deadline=None)
def test_what_is_fetched_takes_at_most_half_of_the_prefill_that_it_saves(
    sizes: list[int], latency_s: float, rate: float, prefill: float, held: int, limit_s: float
) -> None:
    """And no other prefix that does so saves more."""
    candidates = [Prefix(256 * (n + 1), sum(sizes[: n + 1])) for n in range(len(sizes))]

    def cost(nbytes: int) -> float:
        return 2 * latency_s + nbytes / rate

    chosen = worthwhile(candidates, cost, prefill_tokens_per_s=prefill, held_tokens=held, limit_s=limit_s)
    saving = {
        n: (one.n_tokens - held) / prefill - cost(one.nbytes)
        for n, one in enumerate(candidates)
        if one.n_tokens > held and cost(one.nbytes) <= min(limit_s, WORTH_SHARE * (one.n_tokens - held) / prefill)
    }
    assert (chosen in saving) if saving else chosen == -1
    if saving:
        assert saving[chosen] == max(saving.values())


def test_a_caller_that_does_not_know_its_speed_gets_what_comes_in_time() -> None:
    """As from the local store."""
    candidates = [Prefix(256, 10 * MB), Prefix(512, 20 * MB), Prefix(768, 90 * MB)]
    link, _ = taught(LATENCY_S, 30e6)
    assert worthwhile(candidates, link.seconds, prefill_tokens_per_s=0, held_tokens=0, limit_s=1.0) == 1
    assert worthwhile(candidates, link.seconds, prefill_tokens_per_s=0, held_tokens=512, limit_s=1.0) == -1


def test_a_throttled_link_gives_nothing_to_a_fast_model() -> None:
    """At 30 MB/s blocks of 10 MB come at 770 tokens/s: of use at 300 tokens/s of prefill, not at 2,000."""
    link, _ = taught(LATENCY_S, 30e6)
    candidates = [Prefix(256 * n, 10 * MB * n) for n in range(1, 33)]
    assert worthwhile(candidates, link.seconds, prefill_tokens_per_s=2000, held_tokens=0) == -1
    assert worthwhile(candidates, link.seconds, prefill_tokens_per_s=300, held_tokens=0) == 31
