"""Flat LRU of another simulator, libcachesim, beside the model and the engine of `kvstore bench eviction`.

For blocks that depend on nothing, leaf-first LRU is flat LRU: the trace's first requests, every block as a prompt of
its own, are a trace of that kind, and there all three must agree: the model exactly, the engine within what it frees
ahead of need. For prompts as they are flat LRU is near, if the last block of a prompt counts as used first: a hit of
libcachesim may then lie behind a hole, and the start of a prompt may make room for its own end.

    pip install libcachesim
    python tests/bench/eviction_oracle.py --trace FILE [--requests 1500]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script

import click

from kvstore.bench.eviction import BUDGET_SHARES, TraceRequest, load_trace, model_lru, replay


def flat_lru(requests: Sequence[TraceRequest], capacity: int) -> int:
    """Hits of libcachesim's LRU with room for so many blocks; the blocks of a prompt are asked for last to first."""
    import libcachesim

    cache = libcachesim.LRU(cache_size=capacity, hashpower=18)
    ask = libcachesim.TraceRequest()
    ask.obj_size = 1
    hits = 0
    for request in requests:
        for block in reversed(request.blocks):
            ask.obj_id = block + 1
            hits += cache.get(ask)
    return hits


def alone(requests: Sequence[TraceRequest]) -> Iterator[TraceRequest]:
    """Every block as a prompt of its own, the last of a prompt first."""
    for request in requests:
        for block in reversed(request.blocks):
            yield TraceRequest(request.at_s, (block,))


@click.command()
@click.option("--trace", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--requests", "count", default=1500, help="Of the trace, for the blocks on their own.")
def main(trace: Path, count: int) -> None:
    """Print shares of blocks hit."""
    requests = load_trace(trace)
    singles = list(alone(requests[:count]))
    print(f"{'':22} budget  libcachesim   model  engine")
    for name, asked, is_replayed in (("blocks on their own", singles, True), ("prompts", requests, False)):
        total = sum(len(request.blocks) for request in asked)
        distinct = len({block for request in asked for block in request.blocks})
        for share in BUDGET_SHARES:
            capacity = max(1, round(share * distinct))
            flat, model = flat_lru(asked, capacity) / total, model_lru(asked, capacity).hit / total
            engine = f"{replay(asked, capacity, 'lru').hit / total:.5f}" if is_replayed else "-"
            if is_replayed and flat != model:
                raise click.ClickException(f"at {share}: libcachesim hits {flat:.5f}, the model {model:.5f}")
            print(f"{name:22} {share:6.2f}  {flat:11.5f} {model:.5f} {engine:>7}", flush=True)


if __name__ == "__main__":
    main()
