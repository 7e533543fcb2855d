"""Marks of first touches: who touched a block before, within a bound, over restarts, and of no weight when lost."""

from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path

from kvstore.engine import Engine
from kvstore.index.marks import CHUNK_MARKS, CHUNKS, Marks
from tests.support.engine import options

NOW_S = 1_800_000_000


def key(number: int) -> bytes:
    """A block's key."""
    return hashlib.sha256(number.to_bytes(8, "little")).digest()


KEYS = [key(number) for number in range(10)]


def test_a_block_is_known_once_another_prompt_touched_it() -> None:
    """Not by the same prompt, however often; and then for every prompt."""
    marks = Marks()
    assert [marks.touch(KEYS[:4], 1, NOW_S) for _ in range(5)] == [0] * 5
    assert marks.touch([*KEYS[:2], *KEYS[6:8]], 2, NOW_S) == 2
    assert marks.touch([*KEYS[:2], *KEYS[6:8]], 2, NOW_S) == 2, "the prompt itself sees that another one did"
    assert marks.touch(KEYS[:8], 3, NOW_S) == 8


def test_it_agrees_with_a_dictionary_while_there_is_room() -> None:
    """Random prompts over blocks that share chunks; saved and loaded now and then, by what changed only."""
    rng, marks, saved = random.Random(7), Marks(), {}
    touched: dict[bytes, set[int]] = {}
    for _ in range(300):
        prompt = rng.randrange(1, 20)
        keys = [key(rng.randrange(2000)) for _ in range(rng.randrange(1, 8))]
        expected = 0
        for number, one in enumerate(keys, 1):
            touched.setdefault(one, set()).add(prompt)
            if len(touched[one]) > 1:
                expected = number
        assert marks.touch(keys, prompt, NOW_S) == expected
        if rng.random() < 0.1:
            saved |= marks.changed()
            marks = Marks.load(saved.items())
    assert marks.changed().keys() <= set(range(CHUNKS))


def test_in_a_full_chunk_the_mark_touched_longest_ago_gives_way() -> None:
    """There are never more than 65,536."""
    marks = Marks()
    same_chunk = [(number * CHUNKS + 5).to_bytes(8, "little") + bytes(24) for number in range(1, CHUNK_MARKS + 2)]
    for number, one in enumerate(same_chunk):
        marks.touch([one], 1, NOW_S + number)
    assert marks.touch(same_chunk[:1], 2, NOW_S + 100) == 0, "it was the oldest"
    assert marks.touch(same_chunk[2:3], 2, NOW_S + 101) == 1
    assert sum(map(len, marks.changed().values())) == CHUNK_MARKS * 16


def test_what_is_no_chunk_is_left_out() -> None:
    """Of another size, or of a number that there is not."""
    assert Marks.load([(0, b"x"), (CHUNKS, bytes(CHUNK_MARKS * 16))]).touch(KEYS, 1, NOW_S) == 0


def test_they_survive_a_restart_and_a_rebuild_loses_them(tmp_path: Path) -> None:
    """With the notes of use; nothing depends on them."""
    with Engine.open(tmp_path / "data", options()) as engine:
        assert engine.mark(KEYS, 1) == 0
    with Engine.open(tmp_path / "data", options()) as engine:
        assert engine.mark(KEYS, 2) == len(KEYS)
    shutil.rmtree(tmp_path / "data" / "index")
    with Engine.open(tmp_path / "data", options()) as engine:
        assert engine.mark(KEYS, 3) == 0
