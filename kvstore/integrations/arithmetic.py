"""A quality probe: the prefix contains multi-step arithmetic problems, and the loss on their answers is measured.

    statement   A = 7 + 5          in the prefix, among text
                B = A - 3
    answers     A = 12             after it: every step needs its line of the statement, and the answer before
                B = 9

Looking a passage up in the prefix (needle recall) does not tell profiles apart: caches of 4 bits keep it at 100 %
while solving such problems already suffers. Answers to other problems with the same names, scored the same way, show
what the model says without solving anything: a model that finds them as likely only guesses.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PROBLEMS = 4
STEPS = 4
NAMES = "ABCDEFGHJKLMNPQR"
OPERAND_MAX = 9
VALUE_MAX = 99

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Answers:
    """Tokens that name every step and its value; `scored`: indices of those that are values."""

    tokens: tuple[int, ...]
    scored: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Problems:
    """The tokens that state the problems, the right answers, and those of other problems with the same names."""

    statement: tuple[int, ...]
    right: Answers
    wrong: Answers


def problems(number: int, encode: Encode) -> Problems:
    """The problems of window `number`, the same for every call; `encode`: text to tokens, without special ones."""
    lines, values = _solved(2 * number)
    _, others = _solved(2 * number + 1)
    statement = "\n\n" + "\n".join(lines) + "\n\n"
    return Problems(tuple(encode(statement)), _answers(values, encode), _answers(others, encode))


def _solved(seed: int) -> tuple[list[str], list[int]]:
    """The lines of PROBLEMS chains of STEPS lines each, and the value of every line."""
    chance = random.Random(seed)  # noqa: S311  # the same problems for every call
    lines: list[str] = []
    values: list[int] = []
    for index, name in enumerate(NAMES):
        first = index % STEPS == 0
        before = chance.randint(2, OPERAND_MAX) if first else values[-1]
        sign, after, value = chance.choice(_steps_from(before))
        values.append(value)
        lines.append(f"{name} = {before if first else NAMES[index - 1]} {sign} {after}")
    return lines, values


def _steps_from(before: int) -> list[tuple[str, int, int]]:
    """Signs, operands and results of the steps that stay between 0 and VALUE_MAX."""
    found = []
    for operand in range(2, OPERAND_MAX + 1):
        found += [("+", operand, before + operand), ("-", operand, before - operand), ("*", operand, before * operand)]
    return [step for step in found if 0 <= step[2] <= VALUE_MAX]


def _answers(values: Sequence[int], encode: Encode) -> Answers:
    tokens: list[int] = []
    scored: list[int] = []
    for name, value in zip(NAMES, values, strict=True):
        tokens += encode(f"\n{name} =")
        answer = encode(f" {value}")
        scored += range(len(tokens), len(tokens) + len(answer))
        tokens += answer
    return Answers(tuple(tokens), tuple(scored))


assert len(NAMES) == PROBLEMS * STEPS
