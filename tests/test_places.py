"""The daemon notices by itself when something in prompts changes with every request."""

from __future__ import annotations

import logging
import random

import pytest

from kvstore.core.blocks import pack_tokens
from kvstore.telemetry.places import COMMON_TOKENS_MAX, COMMON_TOKENS_MIN, PLACES_MAX, Places, alike

ROOT = bytes(32)
REST = list(range(5000, 5150))


def tokens(seed: int, count: int) -> list[int]:
    """Some tokens, the same for a seed."""
    return random.Random(seed).choices(range(4000), k=count)


class Parting:
    """Prompts with the same beginning, `nonces` after it, and the same rest; the first of them is stored."""

    def __init__(self, places: Places, common: int = 40, seed: int = 1) -> None:
        self.places = places
        self.common = tokens(seed, common)

    def ask(self, nonce: int, rest: list[int] | None = None) -> None:
        """One more prompt."""
        sides = [nonce + 1, 7, *(REST if rest is None else rest)], [1, 7, *REST]
        packed = (pack_tokens(sides[0]), pack_tokens(sides[1]))
        short = (packed[0][:96], packed[1][:96])
        self.places.note(ROOT, "small-lm", pack_tokens(self.common), short, lambda: packed)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said at WARNING."""
    return [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]


def test_the_third_prompt_that_parts_at_a_place_gives_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """The stored one is the first; later ones are counted, and not said again."""
    places = Places()
    parting = Parting(places)
    parting.ask(10)
    assert not warnings(caplog) and not places.reported()
    for nonce in range(20, 25):
        parting.ask(nonce)
    (said,) = warnings(caplog)
    assert "3 prompts of small-lm share their first 40 tokens" in said and "kvstore why --last 3" in said
    (place,) = places.reported()
    assert (place.alias, place.common_tokens, place.prompts) == ("small-lm", 40, 7)


def test_the_same_prompt_again_and_again_is_one_prompt(caplog: pytest.LogCaptureFixture) -> None:
    """A retry is no sign of anything."""
    parting = Parting(Places())
    for _ in range(9):
        parting.ask(10)
    assert not warnings(caplog)


def test_questions_after_one_system_prompt_are_no_such_place(caplog: pytest.LogCaptureFixture) -> None:
    """Conversations part there, and what comes after is different."""
    parting = Parting(Places(), 400)
    for number in range(30):
        parting.ask(number * 10, tokens(number + 50, 150))
    assert not warnings(caplog)


@pytest.mark.parametrize("common", [COMMON_TOKENS_MIN - 1, COMMON_TOKENS_MAX + 1])
def test_too_early_and_too_late_are_no_such_place(caplog: pytest.LogCaptureFixture, common: int) -> None:
    """Every prompt has the head of the template; after thousands of tokens little is lost."""
    parting = Parting(Places(), common)
    for nonce in range(9):
        parting.ask(nonce * 10)
    assert not warnings(caplog)


def test_hashes_that_share_a_digit_part_at_the_same_place(caplog: pytest.LogCaptureFixture) -> None:
    """One prompt parts a token later than the others."""
    places = Places()
    for nonce, more in ((10, []), (20, [3]), (30, [])):
        parting = Parting(places)
        parting.common += more
        parting.ask(nonce)
    assert len(warnings(caplog)) == 1


def test_the_table_of_places_is_bounded() -> None:
    """The oldest make room."""
    places = Places()
    for seed in range(PLACES_MAX + 40):
        Parting(places, seed=seed).ask(10)
    assert len(places._seen) == PLACES_MAX


def test_alike_are_token_strings_that_share_a_dozen_in_a_row_anywhere() -> None:
    """Moved, too; not a few, and not the same ones in another order."""
    long = tokens(3, 100)
    assert alike(pack_tokens([1, 2, *long]), pack_tokens([9, 9, 9, *long[20:60]]))
    assert not alike(pack_tokens(long[:11]), pack_tokens(long))
    assert not alike(pack_tokens(long), pack_tokens(sorted(long)))
    assert not alike(b"", pack_tokens(long))
