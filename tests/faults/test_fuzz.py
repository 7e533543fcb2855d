"""The committed corpus and mutations of it through every parser; atheris goes on from there at length."""

from __future__ import annotations

import random
from pathlib import Path

import msgpack
import pytest

from kvstore.wire import convert
from tests.faults import fuzz
from tests.faults.targets import TARGETS, corpus, strike

MUTATIONS = 5000
# Numbers that parsers have tripped over: signs, limits of widths, lengths that promise too much, empty containers.
ODD = [b"\x00", b"\xff", b"\x80", b"\xc0", b"\x90", b"\xdd\xff\xff\xff\xff", b"\xcf" + b"\xff" * 8, b"-1", b"1e999"]


def mutated(dice: random.Random, seed: bytes, other: bytes) -> bytes:
    """A few bytes changed, cut out, doubled, exchanged for odd ones or for a piece of another input."""
    data = bytearray(seed)
    for _ in range(dice.randrange(1, 5)):
        at, end = sorted(dice.randrange(len(data) + 1) for _ in range(2))
        match dice.randrange(5):
            case 0 if data:
                data[dice.randrange(len(data))] = dice.randrange(256)
            case 1:
                data[at : min(end, at + 8)] = dice.choice(ODD)
            case 2:
                del data[at : min(end, at + dice.choice([1, 8, 300]))]
            case 3:
                data[at:at] = data[at : min(end, at + 64)]
            case _:
                data[at:end] = other[at : at + dice.randrange(65)]
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_bytes_made_up_end_in_a_typed_error(name: str) -> None:
    """Those that once did not, too, which stand in the corpus."""
    dice, inputs = random.Random(name), corpus(name)
    assert [wrong for data in inputs if (wrong := strike(TARGETS[name], data))] == []
    made = (mutated(dice, dice.choice(inputs), dice.choice(inputs)) for _ in range(MUTATIONS))
    assert [wrong for data in made if (wrong := strike(TARGETS[name], data))] == []


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_sound_gets_through(name: str) -> None:
    """A target that takes nothing would find nothing. After a new format: `python -m tests.faults.fuzz corpus`."""
    seeds = TARGETS[name].seeds()
    for seed in seeds:
        TARGETS[name].run(seed)
    assert name in fuzz.TARGETS
    assert set(seeds) <= set(corpus(name))


def test_a_parser_that_lets_an_error_through_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By these few mutations already."""
    monkeypatch.setattr(convert, "unpack_record", msgpack.unpackb)
    dice, inputs = random.Random(1), corpus("states")
    made = (mutated(dice, dice.choice(inputs), dice.choice(inputs)) for _ in range(MUTATIONS))
    assert any(strike(TARGETS["states"], data) for data in made)


@pytest.mark.skipif(bool(fuzz.missing()), reason=f"NOT RUN: {fuzz.missing()}")
def test_the_fuzzer_itself_runs_and_reports(tmp_path: Path) -> None:
    """A second of it finds nothing in a sound parser, and says how much it tried."""
    runs, found = fuzz.fuzz("profile", tmp_path, 1)
    assert runs > 100 and not found
