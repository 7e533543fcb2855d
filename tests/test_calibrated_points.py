"""Points of a basis: held-out text, what another domain says, how they rank, and when the basis has paid for itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvstore.cli.calibrated_points import OTHER_BITS_MAX, break_even_tokens, judged_elsewhere, ranked, split_text
from kvstore.codecs.profiles import parse_profile, pca_profile
from kvstore.quality import Thresholds
from tests.test_gate import quality

POINT = quality(pca_profile(bytes(range(32)), 1, 400), bits_per_value=2.2)
BASELINE = quality("compact", kl_mean=1e-3, kl_p99=1e-2)


@pytest.mark.parametrize("count", [300, 5000, 100_000])
def test_no_text_makes_a_basis_and_judges_it(count: int) -> None:
    """Three parts, one after the other, all of the text, and at most 6,000 tokens for the basis."""
    parts = split_text(range(count))
    assert [*parts[0], *parts[1], *parts[2]] == list(range(count))
    assert 0 < len(parts[1]) < len(parts[0]) <= 6000 and len(parts[2]) >= len(parts[0])


@pytest.mark.parametrize(("times", "rank"), [(1.0, 400), (0.25, 500), (4.0, 300), (1e-9, 799), (1e9, 100)])
def test_a_point_ranks_as_the_bits_that_would_have_its_kl(times: float, rank: int) -> None:
    """Not as the bits that it takes, which say nothing beside those of other codecs."""
    found = ranked(replace(POINT, kl_mean=times * BASELINE.kl_mean), BASELINE)
    profile = parse_profile(found.profile)
    assert (profile.fidelity, profile.keys.param("point"), found.spec) == (rank, 1, profile.spec)


def test_another_domain_refuses_a_point_by_its_bits_or_its_limits() -> None:
    """Over 1.2 times the bits nothing counts; where limits are broken there, those numbers count."""
    limits = Thresholds()
    alike = replace(POINT, bits_per_value=OTHER_BITS_MAX * POINT.bits_per_value)
    assert judged_elsewhere(POINT, alike, limits) == (POINT, "")
    dear = replace(POINT, bits_per_value=1.01 * alike.bits_per_value)
    assert "1.21 times the bits" in judged_elsewhere(POINT, dear, limits)[1]
    worse, why = judged_elsewhere(POINT, replace(alike, kl_mean=0.05), limits)
    assert limits.fault(worse) and not why and worse.bits_per_value == POINT.bits_per_value


def test_a_basis_has_paid_for_itself_after_the_tokens_that_save_its_bytes() -> None:
    """2.4 bits less for each of 100 values are 30 bytes a token."""
    point, baseline = (replace(POINT, bits_per_value=bits) for bits in (2.0, 4.4))
    assert break_even_tokens(3001, point, baseline, 100) == 101
    assert break_even_tokens(3000, baseline, point, 100) == 0
