"""What `kvstore why` costs the daemon beside a match: `python tests/bench/why.py`.

An index of 100,000 rows, prompts of 32k tokens, three more namespaces. Each case is a prompt that goes another way at
some token: what is noted of a request (on the thread that matches it), and what an admin's question about the prompt
takes, its match included. The bound: at most three matches of the same prompt. CPU time of the thread counts, since
both take turns on a machine with other work.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: `tests` is in the repository's root

from kvstore.bench.bulk import load_rows, sequence_tokens
from kvstore.core.blocks import BLOCK_TOKENS, TOKEN_BYTES, count_tokens
from kvstore.core.keys import Chain
from kvstore.engine import Engine, EngineOptions
from kvstore.telemetry.requests import Asked
from kvstore.telemetry.traffic import Who
from kvstore.telemetry.why import OTHERS_ASKED_MAX, NamespaceIdentity, Why
from tests.support.engine import namespace, put

AT_MOST = 3.0
NS, OTHERS = namespace("small-lm"), [namespace(f"other-{number}") for number in range(3)]
PROMPT_BLOCKS = 128
# Token at which a prompt parts from the stored one; the first is a whole miss, the last a hit but for the end.
PLACES = (0, 40, 1000, 16_000, 32_000)


def timed_us(call: Callable[[], object]) -> float:
    """Microseconds of CPU of one call."""
    started_s = time.thread_time()
    call()
    return (time.thread_time() - started_s) * 1e6


def changed(tokens: bytes, at: int) -> bytes:
    """The prompt with other tokens from one place on, and the same again after it."""
    return tokens[: at * TOKEN_BYTES] + bytes(8 * 3) + tokens[(at + 3) * TOKEN_BYTES :]


def main() -> None:
    """Print the medians and ratios; exit 1 when one is over the bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    over = False
    with tempfile.TemporaryDirectory() as folder:
        whole = load_rows(Path(folder) / "data", NS, args.rows, PROMPT_BLOCKS)
        with Engine.open(Path(folder) / "data", EngineOptions(1 << 60)) as engine:
            for other in OTHERS:
                put(engine, other, range(300))
            print(f"{args.rows:,} rows, prompts of {PROMPT_BLOCKS * BLOCK_TOKENS:,} tokens, P50 of {args.rounds}")
            print(f"{'parts at token':>15} {'match us':>9} {'noted us':>9} {'ratio':>6} {'asked us':>9} {'ratio':>6}")
            for at in PLACES:
                match_us, note_us, ask_us = measure(engine, at, whole, args.rounds)
                ratios = note_us / match_us, ask_us / match_us
                over |= max(ratios) > AT_MOST
                print(f"{at:>15,} {match_us:>9.0f} {note_us:>9.0f} {ratios[0]:>6.2f} {ask_us:>9.0f} {ratios[1]:>6.2f}")
    sys.exit(1 if over else 0)


def measure(engine: Engine, at: int, whole: int, rounds: int) -> tuple[float, float, float]:
    """Medians, microseconds: a match, what is noted of it, and the answer to a question about the prompt."""
    why = Why(engine.nearest)
    identity = NamespaceIdentity(
        NS.root, NS.weights, NS.adapter, NS.layout.digest, NS.dtype, NS.engine, False, NS.alias
    )
    times: list[tuple[float, float, float]] = []
    for number in range(rounds + 10):
        tokens = changed(sequence_tokens(number % whole, PROMPT_BLOCKS * BLOCK_TOKENS), at)
        asked = Asked(Who("worker", 1, NS.root, NS.alias, NS.engine), f"{number}", count_tokens(tokens))
        chain, again = Chain(NS.root, tokens), Chain(NS.root, tokens)
        limit = chain.n_tokens - 1
        match_us = timed_us(lambda: engine.match(chain, 0, limit))  # noqa: B023
        match = engine.match(chain, 0, limit)
        note_us = timed_us(lambda: why.note(asked, chain, match, identity))  # noqa: B023

        def answer() -> None:
            found = engine.match(again, 0, limit)  # noqa: B023
            why.explained(asked, again, found, identity, OTHERS_ASKED_MAX)  # noqa: B023

        times.append((match_us, note_us, timed_us(answer)))
    columns = zip(*times[10:], strict=True)
    one, two, three = (statistics.median(column) for column in columns)
    return one, two, three


if __name__ == "__main__":
    main()
