"""`kvstore bench match`: time of a longest-prefix match, in the engine and over RPC, for growing index sizes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from kvstore.bench.bare import Bare, bare_server
from kvstore.bench.bulk import call_clean, load_rows, sequence_tokens
from kvstore.bench.cases import BenchError, Case, Report, measure
from kvstore.bench.rig import patient
from kvstore.bench.scratch import ScratchDaemon
from kvstore.bench.shape import Shape
from kvstore.client.client import Client
from kvstore.client.session import Session
from kvstore.core.blocks import BLOCK_TOKENS, TOKEN_BYTES
from kvstore.core.keys import Chain
from kvstore.engine import Engine, EngineOptions

PROFILE = "raw"
PROMPTS = 64
STARTS_MAX = 5
UNLIMITED_BYTES = 1 << 60
HASHING, EMPTY = "hashing alone", "empty RPC"


def run(shape: Shape, rounds: int, row_counts: Sequence[int]) -> Report:
    """Times matches of fully stored prompts of `seq_len` tokens, in indexes of these numbers of rows.

    Every prompt comes up before it counts, as in a daemon that has been running. First in the engine, then, on the same
    directories, over RPC; last, starts.
    """
    blocks = shape.seq_len // BLOCK_TOKENS + 1
    if min(row_counts) < blocks:
        raise BenchError(
            f"an index of {min(row_counts)} rows has no prompt of {shape.seq_len} tokens: {blocks} are needed"
        )
    with contextlib.ExitStack() as stack:
        indexes = []
        for n_rows in row_counts:
            daemon = ScratchDaemon(budget_bytes=UNLIMITED_BYTES, scrub_bytes_per_s=0)
            stack.push(daemon.__exit__)
            whole = load_rows(daemon.folder / "data", shape.namespace(PROFILE), n_rows, blocks)
            indexes.append(_Index(shape, n_rows, daemon, _prompts(shape, whole)))
        warm_ups = max(len(index.prompts) for index in indexes)
        with contextlib.ExitStack() as opened:
            in_engine = measure(engine_cases(indexes, opened), rounds, warm_ups)
        for index in indexes:
            call_clean(index.daemon.folder / "data")
        bare = stack.enter_context(bare_server())
        over_rpc = measure(rpc_cases(indexes, stack, bare), rounds, warm_ups)
        starts = [Case(f"open to serving, {index.name}", functools.partial(restart, index.daemon)) for index in indexes]
        return Report("match", asdict(shape), (*in_engine, *over_rpc, *measure(starts, min(rounds, STARTS_MAX), 0)))


@dataclass(frozen=True)
class _Index:
    """A data directory with `n_rows` rows, its daemon, and prompts that are stored in it."""

    shape: Shape
    n_rows: int
    daemon: ScratchDaemon
    prompts: list[bytes]

    @property
    def name(self) -> str:
        """The size, for people."""
        return f"{self.n_rows:,} rows"


def engine_cases(indexes: Sequence[_Index], stack: contextlib.ExitStack) -> list[Case]:
    """Hashing alone, then a match in each index, in this process."""
    shape = indexes[0].shape
    root = shape.namespace(PROFILE).root
    cases = [Case(HASHING, turn(indexes[0].prompts, lambda tokens: Chain(root, tokens).keys()))]
    for index in indexes:
        engine = stack.enter_context(Engine.open(index.daemon.folder / "data", EngineOptions(UNLIMITED_BYTES)))

        def match(tokens: bytes, engine: Engine = engine) -> None:
            demand(engine.match(Chain(root, tokens)).n_tokens, shape.seq_len)

        cases.append(Case(f"engine, {index.name}", turn(index.prompts, match), HASHING, at_most=2.0))
    return cases


def rpc_cases(indexes: Sequence[_Index], stack: contextlib.ExitStack, bare: Bare) -> list[Case]:
    """An empty RPC with the same payload, then a match by a session of each daemon."""
    shape = indexes[0].shape
    payload = bytes(shape.seq_len * TOKEN_BYTES)
    cases = [Case(EMPTY, functools.partial(bare.empty, payload))]
    for index in indexes:
        stack.enter_context(index.daemon)
        session = patient(stack.enter_context(index.daemon.client()), shape, PROFILE)

        def match(tokens: bytes, session: Session = session) -> None:
            demand(session.match(tokens).n_tokens, shape.seq_len - 1)

        cases.append(Case(f"RPC, {index.name}", turn(index.prompts, match), EMPTY, at_most=2.0))
    return cases


def turn(prompts: Sequence[bytes], ask: Callable[[bytes], object]) -> Callable[[], object]:
    """A function that asks about the next prompt each time."""
    following = itertools.cycle(prompts)
    return lambda: ask(next(following))


def demand(n_tokens: int, expected: int) -> None:
    """BenchError unless the match is whole."""
    if n_tokens != expected:
        raise BenchError(f"a match of {n_tokens} instead of {expected} tokens")


def restart(daemon: ScratchDaemon) -> float:
    """Restart the daemon. Returns the seconds until it serves, including interpreter start and imports."""
    daemon.stop()
    call_clean(daemon.folder / "data")
    return daemon.start()


def _prompts(shape: Shape, n_sequences: int) -> list[bytes]:
    numbers = random.Random(0).sample(range(n_sequences), min(PROMPTS, n_sequences))  # noqa: S311
    whole = (shape.seq_len // BLOCK_TOKENS + 1) * BLOCK_TOKENS
    return [sequence_tokens(number, whole)[: shape.seq_len * TOKEN_BYTES] for number in numbers]


def run_remote(shape: Shape, rounds: int, client: Client) -> Report:
    """Read-only cases for a daemon in use: matches in a namespace that it does not know, and an empty RPC."""
    session = patient(client, shape, PROFILE)
    prompts = _prompts(shape, PROMPTS)
    with bare_server() as bare:
        payload = bytes(shape.seq_len * TOKEN_BYTES)
        cases = [
            Case(EMPTY, functools.partial(bare.empty, payload)),
            Case("Match, unknown namespace", turn(prompts, session.match), EMPTY),
        ]
        return Report("match", asdict(shape), measure(cases, rounds))
