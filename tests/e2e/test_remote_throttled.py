"""Over a throttled link no request waits longer for its first token than one that computes everything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.synthetic import make_layout
from tests.support.throttled import FirstToken, throttled

# A quarter of a model with 128 KiB a token, over a quarter of 30 MB/s: the link carries 230 tokens a second. So it is
# worth it for workers that compute fewer than half of that.
LAYOUT, BYTES_PER_S = make_layout(layers=16, heads=4, width=128), 7.5e6
N_TOKENS = 1100
SLOW, FAST = 10.0, 200.0
TRIES = 10


def test_over_a_throttled_link_no_first_token_comes_later_than_a_cold_one(tmp_path: Path) -> None:
    """Whether a prompt is read from the tier, in part, served from here or computed; a slow worker has the first."""
    with throttled(tmp_path, LAYOUT, N_TOKENS, BYTES_PER_S, "raw") as link:
        link.await_measured()

        def come(rate: float, local: int, wanted: Callable[[int], bool], ratio_max: float) -> None:
            # A machine that is busy may be late, or not know in time what the tier has: not each time.
            found = list[FirstToken]()
            while not (found and wanted(found[-1].restored) and found[-1].ratio <= ratio_max):
                assert len(found) < TRIES, found
                found.append(link.first_token(N_TOKENS, rate, local))

        come(SLOW, 0, lambda n: n >= 256, 0.9)
        come(SLOW, 600, lambda n: n > 600, 0.6)
        come(FAST, 0, lambda n: n == 0, 1.1)
        come(FAST, 600, lambda n: n == 600, 0.9)
