"""Test rig for benches: a temporary daemon, sessions without time limits, and checks that results are complete."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from kvstore.bench.cases import BenchError
from kvstore.bench.scratch import ScratchDaemon
from kvstore.bench.shape import Shape, arrays_of
from kvstore.client.client import Client
from kvstore.client.fetch import Representation, Transport
from kvstore.client.results import Hit, StoreResult
from kvstore.client.session import Session

PATIENT_MS = 60_000
MIB = 1 << 20


@dataclass
class Rig:
    """A temporary daemon with its client and sessions. Use it on the thread that made it."""

    shape: Shape
    daemon: ScratchDaemon
    client: Client

    def session(self, profile: str) -> Session:
        """A session of a namespace that only this profile uses, new: it believes nothing of what the store holds."""
        return patient(self.client, self.shape, profile)

    def put(self, profile: str, number: int = 0) -> StoreResult:
        """Store sequence `number` and wait until it is durable."""
        with self.session(profile) as session:
            return require_stored(
                self.shape, session.store(self.shape.tokens(number), self.shape.kv(), wait=True, restored_tokens=0)
            )


def patient(client: Client, shape: Shape, profile: str) -> Session:
    """A session whose time limits decide nothing."""
    return client.session(
        shape.namespace(profile), profile, connect_ms=PATIENT_MS, stall_ms=PATIENT_MS, total_ms=PATIENT_MS
    )


@contextlib.contextmanager
def rig(shape: Shape, **flags: object) -> Iterator[Rig]:
    """A scratch daemon with queues that take two whole sequences, and a client of it."""
    memory_bytes = max(512 * MIB, 2 * shape.nbytes)
    with ScratchDaemon(memory_bytes=memory_bytes, **flags) as daemon, daemon.client() as client:
        yield Rig(shape, daemon, client)


def require_stored(shape: Shape, result: StoreResult) -> StoreResult:
    """The result, which must be of all tokens that have KV."""
    if result.stored_tokens < shape.seq_len:
        raise BenchError(f"only {result.stored_tokens} of {shape.seq_len} tokens were stored: {result.reason}")
    return result


def fetch(
    shape: Shape, session: Session, tokens: bytes, representation: Representation, transport: Transport
) -> list[mx.array]:
    """Every array of a hit that is all of the sequence, evaluated."""
    hit = session.fetch(tokens, representation, transport)
    if not isinstance(hit, Hit) or hit.n_tokens < shape.seq_len:
        raise BenchError(f"a hit of {hit.n_tokens} of {shape.seq_len} tokens: {hit.reason}")
    arrays = arrays_of(hit.layers)
    mx.eval(arrays)
    return arrays
