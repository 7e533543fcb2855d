"""The rule by which the soak tells a leak from noise, on samples that are made up."""

from __future__ import annotations

import math
import random

import pytest

from tests.faults.growth import FILES_PER_MIN_MAX, MIB_PER_MIN_MAX, Growth, Sample, growth_of

LIFE_MIN, EVERY_MIN = 10.0, 0.02


def life(mib_per_min: float = 0.0, files_per_min: float = 0.0, minutes: float = LIFE_MIN, seed: int = 1) -> Growth:
    """What comes of a daemon that warms up, works in waves, and grows by so much a minute."""
    dice = random.Random(seed)
    samples = []
    for number in range(int(minutes / EVERY_MIN)):
        at = number * EVERY_MIN
        warm = 150 + 40 * (1 - math.exp(-at / 1.2))
        busy = 8 * dice.random() + 12 * (dice.random() < 0.1) + 3 * math.sin(at * 8)
        files = 40 + dice.randrange(12) + 30 * (dice.random() < 0.05)
        samples.append(Sample(1000 + at, warm + busy + mib_per_min * at, files + int(files_per_min * at)))
    growth = growth_of(samples)
    assert growth is not None
    return growth


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_leak(seed: int) -> None:
    """Buffers and connections that come and go, after a warm-up."""
    assert life(seed=seed).faults == []


@pytest.mark.parametrize("seed", range(20))
def test_a_leak_is_found_beneath_the_noise(seed: int) -> None:
    """Twice the limit, or more, of either kind, and told as what it is."""
    (memory,) = life(mib_per_min=2 * MIB_PER_MIN_MAX, seed=seed).faults
    (files,) = life(files_per_min=2 * FILES_PER_MIN_MAX, seed=seed).faults
    assert "MiB of memory" in memory
    assert "descriptors" in files


def test_one_jump_is_no_leak() -> None:
    """A buffer that stays from some time on: once, not again and again."""
    flat = [Sample(at * EVERY_MIN, 150 + 5 * (at > 375), 40) for at in range(500)]
    growth = growth_of(flat)
    assert growth is not None
    assert growth.faults == []


def test_warming_up_is_no_leak() -> None:
    """Only the second half of a life counts."""
    samples = [Sample(at * EVERY_MIN, min(100 + at, 300), min(at, 200)) for at in range(500)]
    growth = growth_of(samples)
    assert growth is not None
    assert (growth.mib_per_min, growth.files_per_min, growth.faults) == (0, 0, [])


def test_a_short_life_is_told_and_not_judged() -> None:
    """Its caches are still filling."""
    growth = life(mib_per_min=5, minutes=5)
    assert growth.mib_per_min > 2
    assert growth.faults == []
    assert growth_of([Sample(at * EVERY_MIN, 100, 40) for at in range(60)]) is None
    assert growth_of([]) is None
