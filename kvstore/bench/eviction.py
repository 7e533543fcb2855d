"""`kvstore bench eviction`: what an eviction policy keeps of a trace of requests, replayed against the real engine.

A trace is in Mooncake's format: one JSON object a line, with `timestamp` (milliseconds) and `hash_ids`, the blocks of
the prompt in order; equal ids mean equal prefixes. Each id becomes one block of a few real bytes that counts as
BLOCK_BYTES, so that the index is small beside them. Every request is matched,
what it hit is touched, and the rest is stored: all of it (`always`), as a worker without a memory of its own does; or
what another prompt offered before (`staged`), while the worker's memory holds what was used within TIER_S, and serves
it. `staged-killed` is the same with workers that are killed every TIER_S, so that their memory is lost.

Two rows a budget are models, computed from the trace alone. `optimum` knows the future: it evicts the block whose next
use is farthest, and does not take what is never used again (Belady's rule; as a prefix is used whenever what follows it
is, this is leaf first by itself). `model-lru` is a flat list by last use, in which what comes later in a prompt is
older: leaf-first LRU, against which the engine's is checked.
"""

from __future__ import annotations

import heapq
import json
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvstore.bench import plot
from kvstore.bench.cases import BenchError
from kvstore.blobs.memory import MemoryBlobs
from kvstore.core.blocks import BLOCK_TOKENS, FIDELITY_EXACT, TOKEN_BYTES, Block, Run
from kvstore.core.keys import Chain, Namespace
from kvstore.core.layers import LayerSpec, Layout, PartSpec
from kvstore.engine import Engine, EngineOptions, NewBlock

# Large beside a row of the index, so that the index hardly counts; and so small that the engine, which frees up to
# 256 MB at a time, frees many blocks in one commit.
BLOCK_BYTES = 4 << 20
BUDGET_SHARES = (0.01, 0.05, 0.2, 0.5)
POLICY_NAMES = ("lru",)
OPTIMUM, MODEL_LRU = "optimum", "model-lru"
ALWAYS, STAGED, STAGED_KILLED = "always", "staged", "staged-killed"
# What was used within eight minutes is in the worker's memory.
TIER_S = 480.0
_PART = PartSpec(1, 1, "BF16")
_LAYOUT = Layout((LayerSpec(_PART, _PART),))
_BYTES = bytes(2 * BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One prompt of a trace: when it came, in seconds, and its blocks."""

    at_s: float
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EvictionRow:
    """What one policy made of a trace with one budget.

    `budget_share` is of the trace's different blocks, `hit_share` of all blocks asked for, `written_bytes` are those of
    all blocks stored, `written_per_reused` divides them by the bytes of blocks that were hit (None: nothing was).
    `tier_bytes` is the most that the workers' memory held, whose hits count as well.
    """

    policy: str
    admission: str
    budget_share: float
    hit_share: float
    optimum_hit_share: float
    written_per_reused: float | None
    written_bytes: int
    tier_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Counts:
    """Blocks hit and written, and the most that were in workers' memory."""

    hit: int
    written: int
    in_memory: int = 0


def load_trace(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """The first `limit` requests of a trace, or all. BenchError for a file that is not one."""
    requests: list[TraceRequest] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if len(requests) == limit:
                    break
                if line.strip():
                    requests.append(_request(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{path} cannot be read: {error}") from error
    if not any(request.blocks for request in requests):
        raise BenchError(f"{path} has no requests")
    return requests


def _request(line: str, where: str) -> TraceRequest:
    try:
        fields = json.loads(line)
        ids = tuple(fields["hash_ids"])
        at_s = float(fields["timestamp"]) / 1000
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{where}: not a request with `timestamp` and `hash_ids`") from error
    if not all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each < 1 << 62 for each in ids):
        raise BenchError(f"{where}: `hash_ids` must be whole numbers from 0")
    return TraceRequest(at_s, ids)


def run(
    requests: Sequence[TraceRequest],
    policies: Sequence[str] = POLICY_NAMES,
    shares: Sequence[float] = BUDGET_SHARES,
    admissions: Sequence[str] = (ALWAYS,),
) -> Iterator[EvictionRow]:
    """The rows of every budget: the models first, then each policy in the engine, with each admission."""
    distinct = len({block for request in requests for block in request.blocks})
    asked = sum(len(request.blocks) for request in requests)
    for share in shares:
        capacity = max(1, round(share * distinct))
        best = optimum(requests, capacity)

        def row(
            policy: str, counts: _Counts, admission: str = ALWAYS, best: _Counts = best, share: float = share
        ) -> EvictionRow:
            per_reused = counts.written / counts.hit if counts.hit else None
            hits, most = counts.hit / asked, best.hit / asked
            written, in_memory = counts.written * BLOCK_BYTES, counts.in_memory * BLOCK_BYTES
            return EvictionRow(policy, admission, share, hits, most, per_reused, written, in_memory)

        yield row(OPTIMUM, best)
        yield row(MODEL_LRU, model_lru(requests, capacity))
        for policy in policies:
            for admission in admissions:
                yield row(policy, replay(requests, capacity, policy, admission), admission)


def optimum(requests: Sequence[TraceRequest], capacity: int) -> _Counts:
    """Belady's rule with a bypass, for blocks of equal size."""
    upcoming = _next_uses(requests)
    held: dict[int, int] = {}
    farthest: list[tuple[int, int, int]] = []
    hit = written = 0
    for number, request in enumerate(requests):
        hit += _common(request.blocks, held)
        for depth, (block, use) in enumerate(zip(request.blocks, upcoming[number], strict=True)):
            written += block not in held and use > 0
            held.pop(block, None)
            if use > 0:
                held[block] = use
                heapq.heappush(farthest, (-use, -depth, block))
        while len(held) > capacity:
            use, _, block = heapq.heappop(farthest)
            if held.get(block) == -use:
                del held[block]
    return _Counts(hit, written)


def _next_uses(requests: Sequence[TraceRequest]) -> list[list[int]]:
    """For every block of every request the number of the request that uses it next; 0: none does."""
    later: dict[int, int] = {}
    uses: list[list[int]] = []
    for number in range(len(requests) - 1, -1, -1):
        uses.append([later.get(block, 0) for block in requests[number].blocks])
        later.update(dict.fromkeys(requests[number].blocks, number))
    return uses[::-1]


def model_lru(requests: Sequence[TraceRequest], capacity: int) -> _Counts:
    """A flat list by last use; the blocks of one prompt count as used last to first."""
    held: OrderedDict[int, None] = OrderedDict()
    hit = written = 0
    for request in requests:
        hit += _common(request.blocks, held)
        kept = request.blocks[:capacity]
        for block in reversed(kept):
            written += block not in held
            held[block] = None
            held.move_to_end(block)
        while len(held) > capacity:
            held.popitem(last=False)
    return _Counts(hit, written)


def _common(blocks: Sequence[int], held: Container[int]) -> int:
    """How many blocks at the start of a prompt are held."""
    return next((count for count, block in enumerate(blocks) if block not in held), len(blocks))


class LogicalBlobs(MemoryBlobs):
    """A few bytes each, in memory, that count as BLOCK_BYTES on disk."""

    def stored_bytes(self, root: bytes, nbytes: int) -> int:
        """The same for every block."""
        return BLOCK_BYTES


class MemoryTier:
    """The blocks that workers hold in memory: those used within TIER_S; of workers that are killed none outlives it."""

    def __init__(self, begun_s: float, *, is_killed: bool) -> None:
        self._is_killed = is_killed
        self._begun_s = begun_s
        self._used_s: OrderedDict[int, float] = OrderedDict()
        self.most = 0

    def use(self, request: TraceRequest) -> int:
        """How many leading blocks of a prompt are in memory; afterwards all are."""
        if self._is_killed and request.at_s >= self._begun_s + TIER_S:
            self._begun_s = request.at_s
            self._used_s.clear()
        while self._used_s and next(iter(self._used_s.values())) < request.at_s - TIER_S:
            self._used_s.popitem(last=False)
        found = _common(request.blocks, self._used_s)
        for block in request.blocks:
            self._used_s[block] = request.at_s
            self._used_s.move_to_end(block)
        self.most = max(self.most, len(self._used_s))
        return found


def replay(requests: Sequence[TraceRequest], capacity: int, policy: str, admission: str = ALWAYS) -> _Counts:
    """The trace through an engine of its own, whose index lies in a temporary directory. Its clock is the trace's."""
    now_s = requests[0].at_s
    # One block's bytes, all but one, are for the index.
    budget_bytes = (capacity + 1) * BLOCK_BYTES - 1
    options = EngineOptions(budget_bytes, durability="none", ballast_bytes=0, policy=policy)
    folder = tempfile.mkdtemp(prefix="kvstore-bench-")
    try:
        namespace = Namespace(weights=b"kvstore bench eviction", layout=_LAYOUT, dtype="BF16", engine="bench 1")
        with Engine.open(Path(folder) / "data", options, clock=lambda: now_s, blobs=LogicalBlobs()) as engine:
            tier = None if admission == ALWAYS else MemoryTier(now_s, is_killed=admission == STAGED_KILLED)
            hit = written = 0
            for number, request in enumerate(requests, 1):
                now_s = request.at_s
                one = _ask(engine, namespace, request, number, tier)
                hit, written = hit + one.hit, written + one.written
        return _Counts(hit, written, tier.most if tier else 0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _ask(engine: Engine, namespace: Namespace, request: TraceRequest, number: int, tier: MemoryTier | None) -> _Counts:
    """Match a prompt, touch what was hit, and store the rest; with a tier, as far as another prompt had it, too."""
    tokens = np.repeat(np.asarray(request.blocks, "<i8"), BLOCK_TOKENS).tobytes()
    chain = Chain(namespace.root, tokens)
    match = engine.match(chain)
    engine.touch(match.slices)
    held = match.n_tokens // BLOCK_TOKENS
    keys = chain.keys()
    in_memory, admitted = 0, len(request.blocks)
    if tier is not None:
        in_memory = tier.use(request)
        admitted = max(in_memory, engine.mark(keys, number))
    new = [_new_block(namespace, keys, tokens, at) for at in range(held, admitted)]
    receipt = engine.store(namespace.to_record(), new, protect=keys[:held])
    return _Counts(max(held, in_memory), receipt.blocks)


def _new_block(namespace: Namespace, keys: Sequence[bytes], tokens: bytes, at: int) -> NewBlock:
    """The block at this place of a prompt, of zeros."""
    step = BLOCK_TOKENS * TOKEN_BYTES
    run = Run(BLOCK_TOKENS, 0, BLOCK_TOKENS, FIDELITY_EXACT, namespace.layout.raw_stacks)
    parent = keys[at - 1] if at else namespace.root
    part = tokens[at * step : (at + 1) * step]
    block = Block(namespace.root, parent, keys[at], at * BLOCK_TOKENS, part, FIDELITY_EXACT, (run,))
    return NewBlock(block, [_BYTES, _BYTES])


def plot_rows(rows: Sequence[EvictionRow], path: Path) -> None:
    """An SVG of hit shares by budget, a line a policy. ConfigError when it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for policy in dict.fromkeys(row.policy for row in rows):
        points = [(row.budget_share, row.hit_share) for row in rows if row.policy == policy]
        axes.plot(*zip(*points, strict=True), marker="o", label=policy)
    axes.set_xscale("log")
    axes.set_xlabel("budget, as a share of the different blocks")
    axes.set_ylabel("share of blocks hit")
    axes.legend()
    plot.save(figure, path)
