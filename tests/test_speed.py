"""The speed of prompts as it is measured around an engine."""

from __future__ import annotations

import pytest

from kvstore.integrations import speed as speed_module
from kvstore.integrations.speed import PrefillSpeed, Progress
from tests.support.clock import Clock


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still."""
    return Clock(50.0)


@pytest.fixture
def speed(clock: Clock) -> PrefillSpeed:
    """Nothing measured yet."""
    return PrefillSpeed(clock)


def test_nothing_is_known_at_first_and_models_have_their_own(speed: PrefillSpeed) -> None:
    """0 is "not known", which asks for whatever there is."""
    assert speed.get("a") == 0.0
    speed.add("a", 1000, 2.0)
    assert (speed.get("a"), speed.get("b")) == (500.0, 0.0)


def test_what_is_measured_later_counts_for_more(speed: PrefillSpeed) -> None:
    """A model that became slow, under memory pressure say, is known as slow after a few prompts."""
    speed.add("a", 1000, 1.0)
    for _ in range(8):
        speed.add("a", 1000, 10.0)
    assert 100 <= speed.get("a") < 110


def test_tiny_prompts_say_nothing(speed: PrefillSpeed) -> None:
    """What a call costs is not the model's speed."""
    speed.add("a", speed_module.TOKENS_MIN - 1, 9.0)
    speed.add("a", 1000, 0.0)
    assert speed.get("a") == 0.0


def test_memory_is_bounded(speed: PrefillSpeed) -> None:
    """By models, and by prompts that were started."""
    for number in range(1000):
        speed.add(number, 100, 1.0)
        speed.started("a", [number], 0)
    assert len(speed._sums) == speed_module.MODELS_MAX
    assert len(speed._started) == speed_module.STARTED_MAX


def test_progress_is_measured_from_where_the_prompt_begins(speed: PrefillSpeed, clock: Clock) -> None:
    """The batching server reports after each chunk, and the whole twice."""
    seen: list[tuple[int, int]] = []
    progress = Progress(speed, lambda: "a", lambda *given: seen.append(given))
    progress.begin()
    for done in (512, 1024, 1199, 1200, 1200):
        clock.now_s += 1.0
        progress(done, 1200)
    assert speed.get("a") == pytest.approx(1199 / 3)
    assert seen == [(512, 1200), (1024, 1200), (1199, 1200), (1200, 1200), (1200, 1200)]


def test_a_server_that_reports_the_start_is_measured_from_there(speed: PrefillSpeed, clock: Clock) -> None:
    """What came before, such as a fetch, is not prefill."""
    progress = Progress(speed, lambda: "a", None)
    progress.begin()
    clock.now_s += 100.0
    progress(0, 400)
    clock.now_s += 2.0
    progress(400, 400)
    assert speed.get("a") == 200.0


def test_a_prompt_that_is_reached_was_computed_since_it_was_started(speed: PrefillSpeed, clock: Clock) -> None:
    """With the first token of the answer too; at the end of the answer it is too late."""
    prompt = list(range(300))
    for more, expected in (([], 100.0), ([7], 100.5), ([7, 8], 0.0)):
        known = PrefillSpeed(clock)
        known.started("a", prompt, 100)
        clock.now_s += 2.0
        known.reached("b", prompt)
        known.reached("a", [*prompt, *more])
        assert known.get("a") == expected
