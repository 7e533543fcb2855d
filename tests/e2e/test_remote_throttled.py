"""Over a link of 30 MB/s no request waits longer for its first token than one that computes everything."""

from __future__ import annotations

from pathlib import Path

from tests.support.synthetic import make_layout
from tests.support.throttled import throttled

# 32 KiB a token: the link carries 900 tokens a second, so that it is worth it for workers that compute less than half.
LAYOUT = make_layout(layers=16, heads=4, width=128)
N_TOKENS = 1100
# (tokens a second that the worker computes, tokens that are here): worth it, on the edge, here for half, and not.
CASES = [(60.0, 0), (60.0, 600), (400.0, 0), (600.0, 0), (600.0, 600)]


def test_over_a_throttled_link_no_first_token_comes_later_than_a_cold_one(tmp_path: Path) -> None:
    """Whether the prompt is read from the tier, shortened, served from here or computed."""
    with throttled(tmp_path, LAYOUT, N_TOKENS, 30e6, "raw") as link:
        link.await_measured()
        found = [link.first_token(N_TOKENS, rate, local) for rate, local in CASES]
    assert max(one.ratio for one in found) <= 1.1, found
    assert found[0].restored == N_TOKENS - 1 and found[1].restored == N_TOKENS - 1, found
    assert found[3].restored == 0 and found[4].restored >= 512, found
