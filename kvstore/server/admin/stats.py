"""The Stats reply, made from the daemon's counters and the engine's, and the messages it consists of."""

from __future__ import annotations

import dataclasses
import os
import resource
from collections.abc import Iterable

from kvstore.core.histogram import Distribution
from kvstore.core.layers import PARTS, Layout
from kvstore.core.limits import Limits
from kvstore.core.log import level_in_force
from kvstore.engine import Engine, EngineStats, NamespaceUsage, Reencoded
from kvstore.quality import Verdict
from kvstore.server.calls.call_limits import Admission
from kvstore.server.calls.callers import Sockets
from kvstore.server.counters import Counters
from kvstore.server.policy.admission import StoreAdmission
from kvstore.server.policy.gate import Gate
from kvstore.server.policy.pressure import Pressure
from kvstore.server.storing.uploads import Uploads
from kvstore.server.threads import Threads
from kvstore.telemetry.history import Moment
from kvstore.telemetry.requests import Done, Requests
from kvstore.telemetry.traffic import Labelled, NamespaceTraffic, SessionTraffic, Snapshot, Totals, as_counts
from kvstore.wire.convert import verdict_to_message
from kvstore.wire.v1 import kvstore_pb2 as pb

# Sessions that a reply names.
SESSIONS_MAX = 64
# What a calibrated codec saves of each value: half of the bits of `compact`, 4.46.
SAVED_BITS = 2.23


def stats_reply(
    counters: Counters,
    engine: Engine,
    load: pb.LoadStats,
    *,
    version: str,
    state: str,
    device: str,
    gate: Gate,
    requests: Requests,
    profile: str,
    data_dir: str,
) -> pb.StatsReply:
    """The Stats reply. Reads the index: call it on a worker thread."""
    disk, traffic = engine.stats(), requests.traffic.snapshot()
    counts = counters.counts()
    return pb.StatsReply(
        daemon=pb.DaemonStats(
            version=version,
            pid=os.getpid(),
            uptime_s=counters.uptime_s,
            state="degraded" if disk.degraded and state == "serving" else state,
            device=device,
            detail=disk.degraded,
            profile=profile,
            log_level=level_in_force(),
            data_dir=data_dir,
            descriptors_max=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            descriptors=len(os.listdir("/dev/fd")),
        ),
        disk=disk_message(disk),
        tokens=pb.TokenStats(stored=counts["tokens_stored"], served=counts["tokens_served"]),
        requests=pb.RequestStats(
            match=counts["match"],
            fetch=counts["fetch"],
            store=counts["store"],
            hits=traffic.since_start.hits,
            partial_hits=traffic.since_start.shortened,
            misses=traffic.since_start.misses,
        ),
        miss_reasons=traffic.miss_reasons,
        shortened_reasons=traffic.shortened_reasons,
        since_start=traffic_message(traffic.since_start),
        last_hour=traffic_message(traffic.last_hour),
        lifetime=traffic_message(traffic.lifetime),
        lifetime_since_s=traffic.lifetime_since_s,
        sessions=map(session_message, traffic.sessions[:SESSIONS_MAX]),
        labelled=map(labelled_message, traffic.labelled),
        recent=map(request_message, requests.recent.copy()),
        fetch_s=histogram_message(requests.fetch_s.snapshot()),
        idle_s=histogram_message(disk.idle_s),
        reuse_s=histogram_message(disk.reuse_s),
        store_reasons=counters.store_reasons(),
        evictions={
            cause: pb.Evicted(blocks=blocks, bytes=nbytes) for cause, (blocks, nbytes) in disk.evictions.items()
        },
        refusals=counters.refusals.counts(),
        load=load,
        bytes=pb.ByteStats(
            logical=sum(one.tokens * one.info.layout.token_bytes for one in disk.namespaces),
            stored=disk.stored_bytes,
            written=disk.written_bytes,
            served=counts["bytes_served"],
        ),
        namespaces=[namespace_message(one, gate, traffic) for one in disk.namespaces],
    )


def disk_message(disk: EngineStats) -> pb.DiskStats:
    """The state of the data directory."""
    return pb.DiskStats(
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
    )


def writes_message(admission: StoreAdmission) -> pb.WriteStats:
    """What stores may write, and what was held back."""
    held_back = admission.held_back
    return pb.WriteStats(
        admission=admission.mode,
        day_bytes=admission.budget.day_bytes,
        left_bytes=max(0, admission.budget.left_bytes),
        held_back_stores=held_back.stores,
        held_back_bytes=held_back.nbytes,
    )


def pressure_message(pressure: Pressure, reencoded: Reencoded) -> pb.PressureStats:
    """What was re-encoded, and why nothing is now."""
    return pb.PressureStats(
        fills_up=pressure.watermark(), idle_reason=pressure.why_not, **dataclasses.asdict(reencoded)
    )


def load_message(
    admission: Admission, sockets: Sockets, uploads: Uploads, threads: Threads, limits: Limits
) -> pb.LoadStats:
    """Calls, connections and uploads in progress, with their limits. Event loop only."""
    begun = uploads.under_way()
    return pb.LoadStats(
        clients=admission.callers.count(),
        clients_max=limits.connections_max,
        connections=sockets.connections,
        connections_max=sockets.connections_max,
        calls=sum(admission.calls[:2]),
        calls_max=limits.calls_max,
        uploads=len(begun),
        uploads_max=limits.uploads_max,
        received_bytes=sum(upload.intake.received_bytes for upload in begun),
        waiting=threads.waiting(),
    )


def traffic_message(totals: Totals) -> pb.Traffic:
    """Counters as they travel."""
    return pb.Traffic(**as_counts(totals))


def labelled_message(one: Labelled) -> pb.NamespaceTraffic:
    """The traffic of one label."""
    return pb.NamespaceTraffic(namespace_id=one.root, alias=one.alias, traffic=traffic_message(one.totals))


def request_message(done: Done) -> pb.Request:
    """One request that has ended."""
    return pb.Request(
        at_s=done.at_s,
        kind=done.kind,
        alias=done.alias,
        tokens=done.tokens,
        prompt_tokens=done.prompt_tokens,
        bytes=done.nbytes,
        seconds=done.seconds,
        reason=done.reason,
        request_id=done.request_id,
        pid=done.pid,
    )


def hour_message(hour_s: int, row: Moment) -> pb.Hour:
    """One hour of the history."""
    return pb.Hour(
        hour_s=hour_s,
        traffic=traffic_message(row.totals),
        miss_reasons=row.reasons.get("miss_reasons", {}),
        shortened_reasons=row.reasons.get("shortened_reasons", {}),
        store_reasons=row.reasons.get("store_reasons", {}),
        evicted_bytes=row.evicted_bytes,
        used_bytes=row.used_bytes,
    )


def histogram_message(found: Distribution) -> pb.Histogram:
    """A histogram as a message: upper bounds, a count for each and one beyond them, and the sum."""
    return pb.Histogram(bounds=found.bounds, counts=found.counts, sum=found.total)


def session_message(session: SessionTraffic) -> pb.SessionStats:
    """One worker's row."""
    who = session.who
    return pb.SessionStats(
        pid=who.pid,
        namespace_id=who.root,
        alias=who.alias,
        engine=who.engine,
        profile=who.profile,
        last_s=int(session.last_s),
        last_hit_s=int(session.last_hit_s),
        traffic=traffic_message(session.totals),
    )


def namespace_message(one: NamespaceUsage, gate: Gate, traffic: Snapshot) -> pb.NamespaceStats:
    """One namespace's row, with the profile used for new KV."""
    choice = gate.choose(one.info.root)
    known = traffic.namespaces.get(one.info.root, NamespaceTraffic())
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
        weights=one.info.weights,
        adapter=one.info.adapter,
        layout=one.info.layout.digest,
        profile_refused=choice.refused,
        quality=quality_messages(gate.calibrated(one.info.root)),
        unmeasured=gate.unmeasured(one.info.root),
        used_s=one.used_s,
        orphaned=one.orphaned,
        traffic=traffic_message(known.totals),
        prefill_tokens_per_s=known.tokens_per_s,
        quota_bytes=one.terms.quota_bytes,
        ttl_s=one.terms.ttl_s,
        bases=one.aux_blocks,
        basis_bytes=one.aux_bytes,
        basis_tokens=break_even_tokens(one.aux_bytes, one.info.layout),
    )


def break_even_tokens(basis_bytes: int, layout: Layout) -> int:
    """How many tokens must be stored with a basis until what it saves is as large as it is."""
    parts = [spec.part(name) for spec in layout.layers if not spec.is_exact for name in PARTS]
    values = sum(part.heads * part.width for part in parts)
    return round(8 * basis_bytes / (SAVED_BITS * values)) if values else 0


def quality_messages(verdicts: Iterable[Verdict]) -> list[pb.Quality]:
    """Convert calibration verdicts to messages; a failed verdict says why."""
    return [verdict_to_message(one) for one in verdicts]
