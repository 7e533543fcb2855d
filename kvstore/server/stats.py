"""Plain counters of the daemon, and the Stats reply made from them and the engine's."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterable

from kvstore.core.blocks import Reason
from kvstore.engine import Engine, NamespaceUsage
from kvstore.quality import Verdict
from kvstore.server.gate import Gate
from kvstore.server.refusals import Refusals
from kvstore.wire.convert import verdict_to_message
from kvstore.wire.v1 import kvstore_pb2 as pb


class Counters:
    """What happened since start. Any thread may count."""

    def __init__(self) -> None:
        self.refusals = Refusals()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._miss_reasons: Counter[str] = Counter()
        self._store_reasons: Counter[str] = Counter()
        self._started_s = time.monotonic()

    def add(self, name: str, amount: int = 1) -> None:
        """Count `amount` under `name` (match, fetch, store, hits, ... as in the Stats reply)."""
        with self._lock:
            self._counts[name] += amount

    def fetched(self, n_tokens: int, reason: Reason) -> None:
        """Count the outcome of one fetch."""
        with self._lock:
            self._counts["tokens_served"] += n_tokens
            outcome = "misses" if not n_tokens else "hits" if reason is Reason.OK else "partial_hits"
            self._counts[outcome] += 1
            if reason is not Reason.OK:
                self._miss_reasons[reason.value] += 1

    def stored(self, reason: Reason) -> None:
        """Count why a store gave less than everything."""
        if reason is not Reason.OK:
            with self._lock:
                self._store_reasons[reason.value] += 1

    def reply(
        self,
        engine: Engine,
        load: pb.LoadStats,
        *,
        version: str,
        state: str,
        device: str,
        gate: Gate,
        tokens_stored: int,
    ) -> pb.StatsReply:
        """The Stats reply. Reads the index: call it on a worker thread."""
        disk = engine.stats()
        with self._lock:
            counts, misses, stores = dict(self._counts), dict(self._miss_reasons), dict(self._store_reasons)
        get = counts.get
        return pb.StatsReply(
            daemon=pb.DaemonStats(
                version=version,
                pid=os.getpid(),
                uptime_s=int(time.monotonic() - self._started_s),
                state="degraded" if disk.degraded and state == "serving" else state,
                device=device,
                detail=disk.degraded,
            ),
            disk=pb.DiskStats(
                used_bytes=disk.used_bytes,
                budget_bytes=disk.budget_bytes,
                free_bytes=disk.free_bytes,
                free_floor_bytes=disk.free_floor_bytes,
                blobs=disk.blobs,
                quarantined=disk.quarantined,
                checkpoints=disk.checkpoints,
                checkpoint_bytes=disk.checkpoint_bytes,
                scrubbed_s=disk.scrubbed_s,
                damaged=disk.damaged,
            ),
            tokens=pb.TokenStats(stored=tokens_stored, served=get("tokens_served", 0)),
            requests=pb.RequestStats(
                match=get("match", 0),
                fetch=get("fetch", 0),
                store=get("store", 0),
                hits=get("hits", 0),
                partial_hits=get("partial_hits", 0),
                misses=get("misses", 0),
            ),
            miss_reasons=misses,
            store_reasons=stores,
            evictions={
                cause: pb.Evicted(blocks=blocks, bytes=nbytes) for cause, (blocks, nbytes) in disk.evictions.items()
            },
            refusals=self.refusals.counts(),
            load=load,
            bytes=pb.ByteStats(
                logical=sum(one.tokens * one.info.layout.token_bytes for one in disk.namespaces),
                stored=disk.stored_bytes,
                written=disk.written_bytes,
                served=get("bytes_served", 0),
            ),
            namespaces=[namespace_message(one, gate) for one in disk.namespaces],
        )


def namespace_message(one: NamespaceUsage, gate: Gate) -> pb.NamespaceStats:
    """One namespace's row, with how KV that comes in now is kept."""
    choice = gate.choose(one.info.root)
    return pb.NamespaceStats(
        id=one.info.root,
        alias=one.info.alias,
        tokens=one.tokens,
        bytes=one.disk_bytes,
        blocks=one.blocks,
        logical_bytes=one.tokens * one.info.layout.token_bytes,
        engine=one.info.engine,
        dtype=one.info.dtype,
        layers=len(one.info.layout.layers),
        checkpoints=one.checkpoints,
        checkpoint_bytes=one.checkpoint_bytes,
        profile=choice.profile.name,
        encrypted=one.encrypted,
        profile_refused=choice.refused,
        quality=quality_messages(gate.calibrated(one.info.root)),
        unmeasured=gate.unmeasured(one.info.root),
        used_s=one.used_s,
        orphaned=one.orphaned,
    )


def quality_messages(verdicts: Iterable[Verdict]) -> list[pb.Quality]:
    """Results, and why each profile may not be used."""
    return [verdict_to_message(one) for one in verdicts]
