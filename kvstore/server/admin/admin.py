"""RPC handlers of the Admin service, for people and scripts. Each verb runs on its own threads (`threads.py`)."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable

from kvstore import __version__
from kvstore.core.blocks import Reason
from kvstore.core.text import size_text
from kvstore.engine import BlockInfo, Engine, EvictReport, Selection, StoredSequence
from kvstore.errors import InvalidRequestError
from kvstore.server.admin.basis_intake import BasisIntake
from kvstore.server.admin.explain import Explainer, place_message
from kvstore.server.admin.pins import Pinner
from kvstore.server.admin.settings import Settings
from kvstore.server.admin.stats import (
    hour_message,
    namespace_message,
    pressure_message,
    quality_messages,
    stats_reply,
    writes_message,
)
from kvstore.server.calls.callers import calling
from kvstore.server.calls.rpc_errors import Context
from kvstore.server.counters import Telemetry, moment_of
from kvstore.server.notes import NOTED_S
from kvstore.server.policy.admission import DETAILS, READ_ONLY
from kvstore.server.policy.pressure import Pressure
from kvstore.server.storing.importer import Importer
from kvstore.server.storing.store import StorePath
from kvstore.server.threads import Threads
from kvstore.server.tier.remote_tier import Remote
from kvstore.wire import convert
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc

SHOW_MAX = 100
LIST_MAX = 10_000
FINDINGS_MAX = 1000
PROGRESS_EVERY_S = 1.0
log = logging.getLogger(__name__)


class AdminService(rpc.AdminServicer):
    """The gRPC Admin service. All methods run on the event loop."""

    def __init__(
        self,
        engine: Engine,
        store: StorePath,
        threads: Threads,
        telemetry: Telemetry,
        explainer: Explainer,
        settings: Settings,
        pressure: Pressure,
        remote: Remote,
        state: Callable[[], str],
        device: Callable[[], str],
        load: Callable[[], pb.LoadStats],
    ) -> None:
        self._engine = engine
        self._store = store
        self._threads = threads
        self._counters = telemetry.counters
        self._requests = telemetry.requests
        self._history = telemetry.lifetime.history
        self._explainer = explainer
        self._settings = settings
        self._pressure = pressure
        self._remote = remote
        self._pinner = Pinner(engine)
        self._state = state
        self._device = device
        self._load = load

    async def Stats(self, request: pb.StatsRequest, context: Context) -> pb.StatsReply:
        return await self.snapshot()

    async def snapshot(self) -> pb.StatsReply:
        """All counters now: what Stats answers, and what scrapers read."""
        return await self._threads.admin(self._stats, self._load())

    def _stats(self, load: pb.LoadStats) -> pb.StatsReply:
        reply = stats_reply(
            self._counters,
            self._engine,
            load,
            version=__version__,
            state=self._state(),
            device=self._device() if self._threads.lane.used else "idle",
            gate=self._store.gate,
            requests=self._requests,
            profile=self._store.gate.default_profile,
            data_dir=str(self._settings.data_dir),
        )
        reply.writes.CopyFrom(writes_message(self._store.admission))
        reply.pressure.CopyFrom(pressure_message(self._pressure, self._engine.reencoder.stats()))
        reply.remote.CopyFrom(self._remote.message())
        reply.places.extend(map(place_message, self._explainer.why.places.reported()))
        return reply

    async def History(self, request: pb.HistoryRequest, context: Context) -> pb.HistoryReply:
        return await self._threads.admin(self._hours)

    def _hours(self) -> pb.HistoryReply:
        # The hour that is going on is noted once a minute; who asks wants it up to now.
        self._history.note(moment_of(self._engine, self._requests.traffic.snapshot(), self._counters))
        return pb.HistoryReply(hours=[hour_message(hour_s, row) for hour_s, row in self._history.rows().items()])

    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListReply:
        limit = min(request.limit or LIST_MAX, LIST_MAX)
        if request.sequences:
            return await self._threads.admin(self._list_sequences, request.namespace_prefix, limit)
        if request.namespace_prefix or request.blocks:
            return await self._threads.admin(self._list_blocks, request.namespace_prefix, limit)
        return await self._threads.admin(self._list_namespaces, limit)

    def _list_namespaces(self, limit: int) -> pb.ListReply:
        traffic = self._requests.traffic.snapshot()
        rows = [namespace_message(one, self._store.gate, traffic) for one in self._engine.stats().namespaces]
        return pb.ListReply(namespaces=rows[:limit], truncated=len(rows) > limit)

    def _list_blocks(self, namespace_prefix: bytes, limit: int) -> pb.ListReply:
        found = self._engine.list_blocks(namespace_prefix, limit + 1)
        return pb.ListReply(blocks=map(block_message, found[:limit]), truncated=len(found) > limit)

    def _list_sequences(self, namespace_prefix: bytes, limit: int) -> pb.ListReply:
        found = self._engine.sequences(namespace_prefix, limit + 1)
        rows = []
        for one in found[:limit]:
            info = self._engine.namespace(one.root)
            hits = self._requests.traffic.hits_of(one.own)
            rows.append(sequence_message(one, info.alias if info else "", hits))
        return pb.ListReply(sequences=rows, truncated=len(found) > limit)

    async def Show(self, request: pb.ShowRequest, context: Context) -> pb.ShowReply:
        return await self._threads.admin(self._show, request.key_prefix)

    def _show(self, key_prefix: bytes) -> pb.ShowReply:
        return pb.ShowReply(blocks=map(block_message, self._engine.show(key_prefix)[:SHOW_MAX]))

    async def Why(self, request: pb.WhyRequest, context: Context) -> pb.WhyReply:
        not_noted = await self._threads.note.settled(NOTED_S)
        reply = await self._threads.admin(self._explainer.reply, request)
        reply.not_noted = not_noted
        return reply

    async def Pin(self, request: pb.PinRequest, context: Context) -> pb.PinReply:
        # It writes a file; and evictions by name end pins.
        reply = await self._threads.evict.finish(self._pinner.reply, request)
        if (request.key_prefix or request.tokens) and not request.remove:
            self._remote.push([pin.key for pin in reply.pins])
        return reply

    async def Set(self, request: pb.SetRequest, context: Context) -> pb.SetReply:
        prefix, key, value = request.namespace_prefix, request.key, request.value
        if request.alias:
            prefix = await self._threads.admin(self._settings.namespace_of, request.alias)
        if request.dry_run:
            deletes, stored = await self._threads.admin(self._settings.would_delete, prefix, key, value)
            return pb.SetReply(deletes_bytes=deletes, stored_bytes=stored)
        # Lower limits evict.
        at_once = request.at_once
        if prefix:
            before, value = await self._threads.evict.finish(self._settings.set_terms, prefix, key, value, at_once)
        else:
            before, value = await self._threads.evict.finish(self._settings.set, key, value, at_once)
        return pb.SetReply(before=before, value=value)

    async def Settings(self, request: pb.SettingsRequest, context: Context) -> pb.SettingsReply:
        found = await self._threads.admin(self._settings.in_force)
        return pb.SettingsReply(settings=[pb.Setting(key=key, value=text, source=of) for key, text, of in found])

    async def Evict(self, request: pb.EvictRequest, context: Context) -> pb.EvictReply:
        selection = Selection(
            namespace_prefix=request.namespace_prefix,
            key_prefix=request.key_prefix,
            idle_s=request.idle_s,
            bytes=request.bytes,
            orphans=request.orphans,
            all=request.all,
            is_counted=not calling.get().is_probe,
        )
        if request.shred:
            if not request.namespace_prefix:
                raise InvalidRequestError("shredding takes a namespace")
            await self._threads.evict.finish(self._engine.shred, request.namespace_prefix, request.dry_run)
        report = await self._threads.evict(self._evict, selection, request.dry_run)
        return pb.EvictReply(
            blocks=report.blocks,
            freed_bytes=report.freed_bytes,
            kept_bytes=report.kept_bytes,
            pinned_bytes=report.pinned_bytes,
        )

    def _evict(self, selection: Selection, dry_run: bool) -> EvictReport:
        """Evict, and end the uploads that go along."""
        try:
            return self._engine.evict(selection, dry_run)
        finally:
            self._store.end_evicted()
            self._explainer.why.forget()

    async def Check(self, request: pb.CheckRequest, context: Context) -> AsyncIterator[pb.CheckReply]:
        far = [0, 0]

        def tell(done: int, total: int) -> None:
            far[:] = done, total

        checking = asyncio.ensure_future(self._threads.check(self._engine.check, request.repair, tell))
        while not (await asyncio.wait([checking], timeout=PROGRESS_EVERY_S))[0]:
            yield pb.CheckReply(blobs=far[0], blobs_total=far[1])
        report = checking.result()
        findings = [pb.Finding(kind=one.kind, path=one.path, detail=one.detail) for one in report.findings]
        yield pb.CheckReply(
            blobs=report.blobs,
            bytes=report.bytes,
            repaired=report.repaired,
            removed=report.removed,
            findings=findings[:FINDINGS_MAX],
            done=True,
            blobs_total=far[1],
        )

    async def Export(self, request: pb.ExportRequest, context: Context) -> AsyncIterator[pb.ExportReply]:
        if bool(request.namespace_prefix) == bool(request.key_prefix):
            raise InvalidRequestError("an export is of a namespace or of a key")
        run = self._threads.pack
        shipment = await run(self._engine.transfer.plan, request.namespace_prefix, request.key_prefix)
        plan = pb.ExportPlan(namespace=shipment.record, blobs=len(shipment.keys), bytes=shipment.nbytes)
        yield pb.ExportReply(plan=plan)
        pieces = self._engine.transfer.pieces(shipment)
        try:
            while piece := await run(next, pieces, None):
                yield pb.ExportReply(piece=pb.BlobPiece(blob_bytes=piece[0], data=piece[1]))
        finally:
            run.post(pieces.close)

    async def Import(self, request_iterator: AsyncIterator[pb.BlobPiece], context: Context) -> pb.ImportReply:
        if self._store.admission.mode == READ_ONLY:
            return pb.ImportReply(reason=Reason.READ_ONLY, detail=DETAILS[Reason.READ_ONLY])
        importer = self._importer()
        run = self._threads.pack
        try:
            async for piece in request_iterator:
                if not await run.finish(importer.take, piece.blob_bytes, piece.data):
                    break
            done = await run.finish(importer.finish)
        finally:
            run.post(importer.close)
        if done.blobs:
            log.info("imported %d blobs, %d of them new, %s", done.blobs, done.stored, size_text(done.new_bytes))
        return pb.ImportReply(
            blobs=done.blobs, held=done.held, new_bytes=done.new_bytes, reason=done.reason, detail=done.detail
        )

    async def PutBasis(self, request_iterator: AsyncIterator[pb.BasisPiece], context: Context) -> pb.PutBasisReply:
        if self._store.admission.mode == READ_ONLY:
            return pb.PutBasisReply(reason=Reason.READ_ONLY, detail=DETAILS[Reason.READ_ONLY])
        intake, run = self._basis_intake(), self._threads.pack
        try:
            async for piece in request_iterator:
                await run.finish(intake.take, piece)
            done = await run.finish(intake.finish)
        finally:
            run.post(intake.close)
        return pb.PutBasisReply(digest=done.digest, new_bytes=done.new_bytes, reason=done.reason, detail=done.detail)

    def _basis_intake(self) -> BasisIntake:
        return BasisIntake(self._engine, self._store.encryption, self._store.receiver.buffers)

    def _importer(self) -> Importer:
        return Importer(
            self._engine,
            functools.partial(self._store.encryption, isolated=False),
            self._store.receiver.buffers,
        )

    async def RecordQuality(self, request: pb.RecordQualityRequest, context: Context) -> pb.RecordQualityReply:
        namespace = convert.namespace_from_message(request.namespace, request.layout)
        if namespace is None:
            raise InvalidRequestError("a measurement comes with the layout of what was measured")
        verdict = convert.verdict_from_message(request.quality)
        return pb.RecordQualityReply(refused=await self._threads.admin(self._store.gate.record, namespace, verdict))

    async def ListQuality(self, request: pb.ListQualityRequest, context: Context) -> pb.ListQualityReply:
        found = await self._threads.admin(self._store.gate.all_calibrated, request.namespace_prefix)
        rows = [
            pb.NamespaceQuality(
                id=root,
                alias=one.alias,
                engine=one.engine,
                quality=quality_messages(verdict for _, verdict in sorted(one.results.items())),
            )
            for root, one in found
        ]
        return pb.ListQualityReply(namespaces=rows)

    async def ForgetQuality(self, request: pb.ForgetQualityRequest, context: Context) -> pb.ForgetQualityReply:
        if bool(request.namespace_prefix) == request.all:
            raise InvalidRequestError("forgetting takes a namespace, or all")
        forgotten = await self._threads.admin(self._store.gate.forget, request.namespace_prefix, request.profile)
        return pb.ForgetQualityReply(results=forgotten)


def sequence_message(one: StoredSequence, label: str, hits: int) -> pb.SequenceInfo:
    """One sequence as List tells it."""
    return pb.SequenceInfo(
        key=one.key,
        namespace_id=one.root,
        label=label,
        tokens=one.tokens,
        bytes=one.nbytes,
        own_bytes=one.own_bytes,
        created_s=one.created_s,
        accessed_s=one.used_s,
        hits=hits,
    )


def block_message(info: BlockInfo) -> pb.BlockInfo:
    """One block as List and Show tell it."""
    block = info.row.block
    recipes = {stack.recipe for run in block.runs for stack in run.stacks}
    return pb.BlockInfo(
        key=block.key,
        parent=block.parent,
        namespace_id=block.root,
        start=block.start,
        n_tokens=block.n_tokens,
        bytes=info.nbytes,
        fidelity=block.fidelity,
        created_s=block.created_s,
        accessed_s=info.accessed_s,
        error=info.error,
        recipes=sorted(str(recipe) for recipe in recipes),
        path=info.path,
        runs=len(block.runs),
        checkpoint=block.is_checkpoint,
        basis=info.row.is_aux,
        references=info.references,
        lost=info.row.is_lost,
    )
