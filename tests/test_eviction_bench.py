"""`kvstore bench eviction`: the models against brute force, and the engine against the models."""

from __future__ import annotations

import json
import random
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.bench.cases import BenchError
from kvstore.bench.eviction import (
    ALWAYS,
    STAGED,
    STAGED_KILLED,
    TIER_S,
    EvictionRow,
    MemoryTier,
    TraceRequest,
    load_trace,
    model_lru,
    optimum,
    replay,
    run,
)
from kvstore.cli.app import cli


def requests_of(*prompts: tuple[int, ...]) -> list[TraceRequest]:
    """One request a second."""
    return [TraceRequest(float(at), blocks) for at, blocks in enumerate(prompts)]


def conversations(count: int, seed: int = 1) -> list[TraceRequest]:
    """Prompts of conversations that take turns and grow; each begins with one of two system prompts."""
    draw = random.Random(seed)
    fresh = iter(range(2, 1 << 20))
    open_ones: list[tuple[int, ...]] = []
    prompts = []
    for _ in range(count):
        if not open_ones or draw.random() < 0.5:
            open_ones.append((draw.randrange(2), *(next(fresh) for _ in range(draw.randrange(1, 5)))))
        at = draw.randrange(max(0, len(open_ones) - 8), len(open_ones))
        open_ones[at] += tuple(next(fresh) for _ in range(draw.randrange(3)))
        prompts.append(open_ones[at])
    return requests_of(*prompts)


def most_hits(requests: list[TraceRequest], capacity: int) -> int:
    """The most blocks that any way of keeping prefixes could hit, by trying all of them."""

    @cache
    def best(at: int, held: frozenset[int]) -> int:
        if at == len(requests):
            return 0
        blocks = requests[at].blocks
        hits = next((count for count, block in enumerate(blocks) if block not in held), len(blocks))
        have = held | set(blocks)
        size = min(capacity, len(have))
        return hits + max(best(at + 1, frozenset(kept)) for kept in combinations(sorted(have), size))

    return best(0, frozenset())


CHAINS = ((1,), (1, 2), (1, 2, 3), (1, 4), (5,), (5, 6))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(CHAINS), min_size=1, max_size=6), st.integers(1, 3))
def test_the_optimum_is_what_trying_everything_finds(prompts: list[tuple[int, ...]], capacity: int) -> None:
    """Belady's rule is right for prefixes too."""
    requests = requests_of(*prompts)
    assert optimum(requests, capacity).hit == most_hits(requests, capacity)


@pytest.mark.parametrize("capacity", [12, 30])
def test_the_engine_hits_what_leaf_first_lru_hits(capacity: int) -> None:
    """Within what it frees ahead of need, and never more than the optimum."""
    requests = conversations(120)
    asked = sum(len(request.blocks) for request in requests)
    engine, model, best = (
        each.hit / asked
        for each in (replay(requests, capacity, "lru"), model_lru(requests, capacity), optimum(requests, capacity))
    )
    assert 0 < model < best
    assert engine == pytest.approx(model, abs=0.01)
    assert engine <= best


def test_with_room_for_everything_each_block_is_written_once() -> None:
    """And every block that was seen before is a hit."""
    requests = conversations(40)
    distinct = len({block for request in requests for block in request.blocks})
    rows = list(run(requests, shares=[1.0]))
    assert [row.policy for row in rows] == ["optimum", "model-lru", "lru"]
    asked = sum(len(request.blocks) for request in requests)
    for row in rows[1:]:
        assert row.hit_share == pytest.approx((asked - distinct) / asked)
        assert row.hit_share == row.optimum_hit_share
        assert row.written_bytes == distinct * (4 << 20)


def test_staged_writes_less_and_the_memory_of_workers_makes_up_for_it() -> None:
    """At most what is written always; killed workers cost hits, and nothing more is written than was seen twice."""
    requests = conversations(120)
    found = run(requests, shares=[0.5], admissions=[ALWAYS, STAGED, STAGED_KILLED])
    _, _, always, staged, killed = found
    assert staged.written_bytes < always.written_bytes and staged.tier_bytes > 0 == always.tier_bytes
    assert killed.hit_share <= staged.hit_share and staged.hit_share >= always.hit_share


def test_the_memory_of_workers_holds_what_was_used_within_its_time() -> None:
    """And loses all of it where they are killed."""
    requests = [TraceRequest(at_s, (1, 2)) for at_s in (0.0, TIER_S, 2 * TIER_S + 1)]
    for is_killed, found in ((False, [0, 2, 0]), (True, [0, 0, 0])):
        tier = MemoryTier(0.0, is_killed=is_killed)
        assert [tier.use(request) for request in requests] == found


def test_the_verb_prints_a_row_a_policy_and_budget(tmp_path: Path) -> None:
    """As JSON, with the names that the documents give."""
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 1000 * one.at_s, "hash_ids": one.blocks, "input_length": 1} for one in conversations(30)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ["bench", "eviction", "--trace", str(trace), "--budget", "0.5", "--requests", "20"]
    found = CliRunner().invoke(cli, [*asked, "--json"])
    assert found.exit_code == 0, found.output
    rows = [EvictionRow(**row) for row in json.loads(found.stdout)["rows"]]
    assert [(row.policy, row.admission, row.budget_share) for row in rows] == [
        ("optimum", "always", 0.5),
        ("model-lru", "always", 0.5),
        ("lru", "always", 0.5),
    ]
    table = CliRunner().invoke(cli, asked)
    assert "model-lru" in table.stdout


@pytest.mark.parametrize(
    "text",
    ["", "{}\n", "[1]\n", '{"timestamp": 0, "hash_ids": [-1]}\n', '{"timestamp": "x", "hash_ids": [1]}\n', "\xff"],
)
def test_a_file_that_is_no_trace_is_one_clear_error(tmp_path: Path, text: str) -> None:
    """Also an empty one, and one that does not exist."""
    trace = tmp_path / "trace.jsonl"
    trace.write_bytes(text.encode("latin-1"))
    with pytest.raises(BenchError):
        load_trace(trace)
    with pytest.raises(BenchError):
        load_trace(tmp_path / "missing")
