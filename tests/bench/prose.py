"""A seeded random sample of the package's prose (docstrings, comments, messages), printed for a person to judge.

    python tests/bench/prose.py [--seed 1] [--count 40] [--skip PATH ...]

Count the samples that need a second reading. Messages are string literals in `raise`, log calls and click's `help=`.
Generated code (`kvstore/wire/v1`) is left out. The same seed on the same tree draws the same places.
"""

from __future__ import annotations

import argparse
import ast
import io
import random
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / "kvstore/wire/v1"
LOG_METHODS = frozenset({"debug", "info", "warning", "error", "exception", "critical"})
DIRECTIVES = ("# noqa", "# type:", "# ruff:", "# pragma", "#!")
MIN_WORDS = 3


class Sample(NamedTuple):
    """One piece of prose and where it starts."""

    path: str
    line: int
    kind: str
    text: str


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring in a module, the module's own included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every comment; adjacent lines that hold nothing but a comment are one sample."""
    run: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.string.startswith(DIRECTIVES):
            continue
        alone = token.line.strip() == token.string
        if run and not (alone and token.start[0] == last + 1):
            yield first, "\n".join(run)
            run = []
        if not run:
            first = token.start[0]
        run.append(token.string)
        last = token.start[0] if alone else -1
    if run:
        yield first, "\n".join(run)


def literal_text(node: ast.AST) -> str:
    """A string literal's text, with each f-string field as `{}`; empty for any other expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(literal_text(part) or "{}" for part in node.values)
    return ""


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of the string literals passed to a raised exception, to a log call, or as `help=`."""
    for node in ast.walk(tree):
        found: list[ast.expr] = []
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found += node.exc.args
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr in LOG_METHODS:
                found += node.args
            found += [keyword.value for keyword in node.keywords if keyword.arg == "help"]
        for expression in found:
            text = literal_text(expression)
            if text:
                yield expression.lineno, text


def samples(package: Path) -> list[Sample]:
    """Every sample of at least `MIN_WORDS` words in a package, in order of path and line."""
    found: list[Sample] = []
    for path in sorted(package.rglob("*.py")):
        if path.is_relative_to(GENERATED):
            continue
        source = path.read_text()
        tree = ast.parse(source)
        name = str(path.relative_to(ROOT))
        kinds = {"docstring": docstrings(tree), "comment": comments(source), "message": messages(tree)}
        for kind, drawn in kinds.items():
            found += [Sample(name, line, kind, text) for line, text in drawn if len(text.split()) >= MIN_WORDS]
    return sorted(found)


def main() -> None:
    """Print the samples drawn with the given seed."""
    parser = argparse.ArgumentParser(description="Print a seeded random sample of the package's prose.")
    parser.add_argument("--seed", type=int, default=1, help="seed of the draw")
    parser.add_argument("--count", type=int, default=40, help="number of samples to print")
    parser.add_argument("--skip", nargs="*", default=[], help="paths to leave out of the printed samples")
    arguments = parser.parse_args()
    every = samples(ROOT / "kvstore")
    drawn = random.Random(arguments.seed).sample(every, min(arguments.count, len(every)))
    for number, sample in enumerate(drawn, 1):
        if sample.path not in arguments.skip:
            print(f"{number}. {sample.path}:{sample.line} ({sample.kind})\n{sample.text}\n")


if __name__ == "__main__":
    main()
