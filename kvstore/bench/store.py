"""`kvstore bench store`: how long a store holds its caller, and when the bytes are durable."""

from __future__ import annotations

import functools
import itertools
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kvstore.bench.bulk import sequence_tokens
from kvstore.bench.cases import BenchError, Case, Report, measure
from kvstore.bench.rig import Rig, require_stored, rig
from kvstore.bench.shape import Memory, Shape
from kvstore.core.blocks import TOKEN_BYTES, Reason
from kvstore.core.layers import KVLayer

SHARED_PERCENT = 90


def run(shape: Shape, rounds: int) -> Report:
    """A new sequence each time; the daemon is emptied before each, so that nothing depends on how many came before."""
    with rig(shape) as made:
        bench = _Stores(made, shape.kv())
        memory, file = Memory(shape.nbytes), made.daemon.folder / "plain"
        cases = [
            Case("memcpy", memory.copy, nbytes=shape.nbytes),
            Case("write and fsync of one file", functools.partial(write, file, memory), nbytes=shape.nbytes),
            bench.case("raw, blocked", "memcpy", 1.5, wait=False),
            bench.case("raw, durable", "write and fsync of one file", 2.0),
            bench.case("8-bit, durable", "write and fsync of one file", profile="affine8"),
            bench.sharing_case(),
        ]
        return Report("store", asdict(shape), measure(cases, rounds), bench.facts)


def write(path: Path, memory: Memory) -> None:
    """The bytes in one file, synced; over a file that was there, as little as a file system can do."""
    with path.open("wb", buffering=0) as file:
        view = memory.source.data
        while view.nbytes:
            view = view[file.write(view[: 1 << 30]) :]
        os.fsync(file.fileno())


@dataclass
class _Stores:
    """Cases that store a new token sequence in each round, with the same arrays each time."""

    made: Rig
    layers: list[KVLayer]
    facts: dict[str, float] = field(default_factory=dict)
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def case(
        self, name: str, ceiling: str, at_most: float | None = None, profile: str = "raw", wait: bool = True
    ) -> Case:
        """A whole new sequence. Without `wait` only what the caller waits for is timed."""
        session, shape = self.made.session(profile), self.made.shape

        def store() -> None:
            result = session.store(shape.tokens(next(self.numbers)), self.layers, wait=wait, restored_tokens=0)
            if wait:
                self.facts[f"{name}: bytes on disk / raw"] = require_stored(shape, result).new_bytes / shape.nbytes
            elif result.reason is not Reason.OK:
                raise BenchError(f"a store was not queued: {result.reason}")

        return Case(name, store, ceiling, shape.nbytes, at_most, self.empty, session.flush)

    def sharing_case(self) -> Case:
        """Store a second sequence whose first 90 % are already stored. It should cost only the new 10 %."""
        session, shape = self.made.session("raw"), self.made.shape
        shared = shape.seq_len * SHARED_PERCENT // 100
        now = [0]

        def first() -> None:
            self.empty()
            now[0] = next(self.numbers)
            require_stored(shape, session.store(shape.tokens(now[0]), self.layers, wait=True, restored_tokens=0))

        def second() -> None:
            rest = sequence_tokens(next(self.numbers), shape.seq_len + 1 - shared)
            tokens = shape.tokens(now[0])[: shared * TOKEN_BYTES] + rest
            result = require_stored(shape, session.store(tokens, self.layers, wait=True, restored_tokens=0))
            new_bytes = (shape.seq_len - shared) * shape.layout.token_bytes
            self.facts["second conversation: bytes on disk / bytes that are new"] = result.new_bytes / new_bytes

        return Case(
            f"raw, durable, {SHARED_PERCENT} % shared",
            second,
            "raw, durable",
            (shape.seq_len - shared) * shape.layout.token_bytes,
            before=first,
        )

    def empty(self) -> None:
        """Remove everything from the store."""
        self.made.client.evict(all=True)
