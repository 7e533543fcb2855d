"""What it costs to plan a fetch beside its match alone: `python tests/bench/plan.py`.

A hit of 32k tokens: 128 blocks of 32 layers. A match reads the index; a plan parses the runs of every block, takes a
lease and looks at every blob. Both take turns, and the CPU time of the thread counts: on a busy machine the longer of
two calls is interrupted more often.
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

from kvstore.core.blocks import BLOCK_TOKENS, pack_tokens
from kvstore.core.keys import Chain
from kvstore.core.layers import LayerSpec, Layout, PartSpec
from kvstore.engine import Engine, EngineOptions
from kvstore.server.fetching.fetch import FetchPath
from kvstore.server.lane import Lane
from tests.support.engine import namespace, sequence
from tests.support.limits import make_config

# Few bytes a token: the payload is not read.
PART = PartSpec(1, 2, "F32")


def timed_ms(call: Callable[[], object]) -> float:
    """Milliseconds of CPU of one call."""
    started_s = time.thread_time()
    call()
    return (time.thread_time() - started_s) * 1e3


def main() -> None:
    """One line: P50 of both, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=128)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    space = namespace(layout=Layout((LayerSpec(PART, PART),) * arguments.layers))
    tokens = pack_tokens(range(arguments.blocks * BLOCK_TOKENS + 1))
    with tempfile.TemporaryDirectory() as folder, Engine.open(Path(folder) / "data", EngineOptions(1 << 40)) as engine:
        engine.store(space.to_record(), sequence(space, tokens[: -len(pack_tokens([0]))]))
        lane = Lane()
        path = FetchPath(engine, lane, make_config(min_prefix_tokens=1))

        def plan() -> None:
            made = path.plan(Chain(space.root, tokens), 0)
            assert made.match.n_tokens == arguments.blocks * BLOCK_TOKENS
            made.release()

        def match() -> None:
            assert path.match(Chain(space.root, tokens), 0).n_tokens == arguments.blocks * BLOCK_TOKENS

        rounds = [(timed_ms(match), timed_ms(plan)) for _ in range(arguments.rounds)]
        lane.close()
    match_ms, plan_ms = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(
        f"{arguments.blocks} blocks of {arguments.layers} layers, ms of CPU: match {match_ms:.2f}, plan {plan_ms:.2f}"
    )
    print(f"plan / match {plan_ms / match_ms:.1f}")


if __name__ == "__main__":
    main()
