"""The RPC edge of KVStore: messages to nouns, `threads.py` for what blocks, nothing decided here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from kvstore.config import Config
from kvstore.core.blocks import KEY_BYTES, TOKEN_BYTES, Reason
from kvstore.core.breaker import Deadline
from kvstore.core.keys import Chain
from kvstore.core.layers import Layout
from kvstore.core.log import ID_CHARACTERS_MAX
from kvstore.core.remote_words import RemoteReason
from kvstore.core.text import plain_text
from kvstore.engine import Engine
from kvstore.engine import Match as Matched
from kvstore.errors import InvalidRequestError
from kvstore.server.arguments import store_request
from kvstore.server.calls.callers import Identities, caller_name, caller_pid, is_probe
from kvstore.server.calls.rpc_errors import Context, streaming, unary
from kvstore.server.counters import Counters, Telemetry
from kvstore.server.fetching.costs import Offer, Timing, Way
from kvstore.server.fetching.fetch import FetchPath, FetchPlan
from kvstore.server.fetching.layer_frames import LayerFrames, plan_message
from kvstore.server.fetching.stream_out import Sender, write_within
from kvstore.server.storing.store import StorePath, StorePlan
from kvstore.server.storing.stores import Stores
from kvstore.server.storing.stream_in import StreamIn
from kvstore.server.threads import Threads
from kvstore.server.tier.remote_choice import PREFILL_TOKENS_PER_S, TIME_SHARE, Want
from kvstore.server.tier.remote_path import BEATS, Promoted
from kvstore.server.tier.remote_tier import Remote
from kvstore.telemetry.requests import Asked, Outcome, known_reason
from kvstore.telemetry.traffic import Who
from kvstore.wire.frames import CHUNK_BYTES, PromptRequest, UploadBytes
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc

# So many turns of the loop lie between a caller that goes away and the CancelledError of its handler. Once the reply is
# on its way nothing tells what becomes of it: gRPC's callbacks say "done" and no code, whether it was read or lost, and
# the end of a connection is told to no handler. Such an upload is given up as any other that is idle.
HEARING_TURNS = 3


@dataclass(frozen=True)
class _Planned:
    """A fetch that is ready to be carried out: its plan, and the first message of the reply."""

    plan: FetchPlan
    chain: Chain
    offer: Offer
    message: pb.FetchReply


class KVStoreService(rpc.KVStoreServicer):
    """RPC handlers for inference workers. All methods run on the event loop."""

    def __init__(
        self,
        engine: Engine,
        store: StorePath,
        stores: Stores,
        fetch: FetchPath,
        remote: Remote,
        layers: LayerFrames,
        threads: Threads,
        telemetry: Telemetry,
        config: Config,
    ) -> None:
        self._engine = engine
        self._store = store
        self._stores = stores
        self._fetch = fetch
        self._remote = remote
        self._layers = layers
        self._threads = threads
        self._counters, self._uncounted = telemetry.counters, Counters()
        self._requests = telemetry.requests
        self._why = telemetry.why
        self.refusals = telemetry.counters.refusals
        self._config = config
        self._same_host = bool(config.address.path)
        self._identities = Identities()
        self._stopping = asyncio.Event()

    @unary
    async def Match(self, request: PromptRequest, context: Context) -> pb.MatchReply:
        self._counters_of(context).add("match")
        asked = self._asked(request, context)
        reply, match, chain, offer = await self._threads.read(self._match, request, asked)
        if self._remote.path is not None:
            want = self._want(request, chain, match, offer, context)
            reply.n_tokens = await self._remote.path.reach(want)
            if reply.n_tokens == want.limit:
                reply.reason = Reason.OK
        self._requests.matched(asked, reply.n_tokens, Reason(reply.reason))
        return reply

    def _match(self, request: PromptRequest, asked: Asked) -> tuple[pb.MatchReply, Matched, Chain, Offer]:
        """The answer, and what it was made of."""
        message, identity = request.message, self._identities.of(request.message.namespace)
        chain, way = Chain(identity.root, request.tokens), self._fetch.way(identity, pb.TRANSPORT_PATH, dense=False)
        offer = Offer(message.prefill_tokens_per_s, message.covered_tokens, way)
        match = self._fetch.match(chain, message.fidelity_min, offer)
        self._why.note(asked, chain, match, identity)
        reply = pb.MatchReply(n_tokens=match.n_tokens, reason=match.reason, fidelity=match.fidelity)
        return reply, match, chain, offer

    def _want(self, request: PromptRequest, chain: Chain, match: Matched, offer: Offer, context: Context) -> Want:
        """What a request may want of the remote tier."""
        message = request.message
        left_s = min(context.time_remaining() or 0.0, self._config.fetch_total_ms / 1e3)
        speed = offer.prefill_tokens_per_s or self._requests.traffic.speed(chain.root) or PREFILL_TOKENS_PER_S
        deadline = Deadline(TIME_SHARE * left_s)
        return Want(message.namespace, chain, match, offer, message.fidelity_min, speed, deadline)

    @unary
    async def Fetch(self, request: PromptRequest, context: Context) -> None:
        counters = self._counters_of(context)
        counters.add("fetch")
        asked = self._asked(request, context)
        planned, remote_tokens = await self._planned(request, asked, context)
        plan, way, message = planned.plan, planned.offer.way, planned.message
        complete = False
        try:
            counters.add("tokens_served", plan.match.n_tokens)
            nbytes = sum(piece.row.blob_bytes for piece in plan.match.parts)
            self._requests.fetched(asked, plan.fetch_id, plan.match.n_tokens, plan.match.reason, nbytes, remote_tokens)
            if plan.match.slices and not asked.who.is_probe:
                self._requests.traffic.ended_in(plan.match.slices[-1].row.key)
                # The block before the last, too: a store of the same chat may replace a tail before it is looked at.
                self._remote.push([part.row.key for part in (*plan.match.slices[-2:], plan.match.parts[-1])])
            await write_within(context, message, self._config.limits.stream_stall_s)
            if plan.namespace is None:
                return
            if way == "path":
                counters.add("bytes_served", nbytes)
                # The lease lasts while the worker is connected, at most `lease_s`. A stop of the daemon ends it.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), self._config.limits.lease_s)
            else:
                await self._stream(plan, plan.namespace.layout, way, context)
                complete = True
        finally:
            self._requests.handed_over(plan.fetch_id, complete=complete, by_path=way == "path")
            self._threads.release.post(plan.release)
            if way != "path":  # by path the worker is still reading
                self._fetch.costs.end(plan.fetch_id)

    @unary
    async def FetchBasis(self, request: pb.FetchBasisRequest, context: Context) -> None:
        root = self._identities.of(request.namespace).root
        found = await self._threads.stream(self._engine.aux, root, (request.digest,))
        data = memoryview(found[request.digest])
        for at in range(0, len(data), CHUNK_BYTES):
            piece = pb.BasisPiece(data=bytes(data[at : at + CHUNK_BYTES]))
            await write_within(context, piece, self._config.limits.stream_stall_s)

    async def _planned(self, request: PromptRequest, asked: Asked, context: Context) -> tuple[_Planned, int]:
        """A plan, and how many of its tokens were read from the remote tier for it."""
        planned = await self._plan_on_thread(request, asked)
        path, stall_s = self._remote.path, request.message.stall_ms / 1e3
        if path is None or not stall_s or asked.who.is_probe:
            return planned, 0
        want = self._want(request, planned.chain, planned.plan.match, planned.offer, context)
        if not want.may_gain:
            return planned, 0

        async def match() -> Matched:
            fidelity_min = request.message.fidelity_min
            return await self._threads.read(self._fetch.match, planned.chain, fidelity_min, planned.offer)

        async def beat() -> None:
            await write_within(context, pb.FetchReply(), self._config.limits.stream_stall_s)

        longer, gained, promoted = planned, 0, Promoted(False, path.why_not(want))
        if promoted.why is None:
            # What the plan found stays leased: nothing that is read makes room by evicting it.
            with contextlib.ExitStack() as stack:
                stack.callback(self._release_planned, planned)
                promoted = await path.promote(want, match, beat, stall_s / BEATS)
                if promoted.more:
                    longer = await self._plan_on_thread(request, asked)
                else:
                    stack.pop_all()
            gained = max(0, longer.plan.match.n_tokens - planned.plan.match.n_tokens)
        self._remote.served(gained, promoted)
        self._why.remote(asked, RemoteReason.HIT if gained else promoted.why or "")
        return longer, gained

    async def _plan_on_thread(self, request: PromptRequest, asked: Asked) -> _Planned:
        planning = asyncio.ensure_future(self._threads.read(self._plan, request, asked))
        try:
            return await asyncio.shield(planning)
        except asyncio.CancelledError:
            # The thread goes on and takes a lease that no call needs: release it as soon as it is taken.
            planning.add_done_callback(self._release_late)
            raise

    def _plan(self, request: PromptRequest, asked: Asked) -> _Planned:
        """A plan, how its bytes will go, and the message that says so."""
        message, identity = request.message, self._identities.of(request.message.namespace)
        way = self._fetch.way(identity, message.transport, dense=message.representation == pb.REPRESENTATION_DENSE)
        chain = Chain(identity.root, request.tokens)
        offer = Offer(message.prefill_tokens_per_s, message.covered_tokens, way)
        plan = self._fetch.plan(chain, message.fidelity_min, offer, asked.who.caller)
        try:
            self._why.note(asked, chain, plan.match, identity)
            return _Planned(plan, chain, offer, pb.FetchReply(plan=plan_message(self._engine, plan, way)))
        except BaseException:
            plan.release()
            raise

    def _release_late(self, planning: asyncio.Future[_Planned]) -> None:
        """Release the plan of a call that has gone away."""
        if not planning.cancelled() and planning.exception() is None:
            self._release_planned(planning.result())

    def _release_planned(self, planned: _Planned) -> None:
        """Give up a plan that is not carried out."""
        self._fetch.costs.end(planned.plan.fetch_id)
        self._threads.release.post(planned.plan.release)

    async def _stream(self, plan: FetchPlan, layout: Layout, way: Way, context: Context) -> None:
        make, run = (
            (self._layers.dense, self._threads.decode)
            if way == "dense"
            else (self._layers.packed, self._threads.stream)
        )
        sender = Sender(make(plan, layout), run, self._config.limits.stream_stall_s)
        try:
            await sender.send(context)
            self._fetch.measured(plan)
        finally:
            self._counters_of(context).add("bytes_served", sender.sent_bytes)
            await asyncio.shield(sender.close())

    def _counters_of(self, context: Context) -> Counters:
        """Where to count a call; those of a probe in counters that nobody reads."""
        return self._uncounted if is_probe(caller_name(context.invocation_metadata())) else self._counters

    def _asked(self, request: PromptRequest, context: Context, profile: str = "") -> Asked:
        """The caller and its namespace. Raises InvalidRequestError for an invalid identity."""
        metadata, message = context.invocation_metadata(), request.message
        identity, caller = self._identities.of(message.namespace), caller_name(metadata)
        pid = caller_pid(metadata)
        who = Who(caller, pid, identity.root, identity.alias, identity.engine, profile, is_probe(caller))
        n_tokens = len(request.tokens) // TOKEN_BYTES
        covered = getattr(message, "covered_tokens", 0)
        speed = getattr(message, "prefill_tokens_per_s", 0.0)
        continued = getattr(message, "continued_tokens", 0)
        return Asked(
            who, plain_text(message.request_id, ID_CHARACTERS_MAX), n_tokens, min(covered, n_tokens), speed, continued
        )

    @unary
    async def BeginStore(self, request: PromptRequest, context: Context) -> pb.BeginStoreReply:
        counters = self._counters_of(context)
        counters.add("store")
        asked = planning = None
        try:
            asked = self._asked(request, context, request.message.profile)
            planning = asyncio.ensure_future(self._threads.plan(self._begin, request, asked.who.caller))
            plan, reply = await asyncio.shield(planning)
            for _ in range(HEARING_TURNS):
                await asyncio.sleep(0)
        except InvalidRequestError:
            counters.stored(Reason.INVALID)
            if asked is not None:
                self._requests.not_stored(asked, 0, Reason.INVALID)
            raise
        except asyncio.CancelledError:
            # The caller will not learn of the upload that the thread opened or is about to open.
            if planning is not None:
                planning.add_done_callback(self._forget)
            raise
        counters.stored(plan.reason)
        if plan.upload is None:
            self._requests.not_stored(asked, plan.held_tokens, plan.reason)
        else:
            self._requests.begun(asked, reply.upload_id, plan.upload.start)
        return reply

    def _begin(self, request: PromptRequest, caller: str) -> tuple[StorePlan, pb.BeginStoreReply]:
        """A plan, and the message that says so."""
        wanted = store_request(request, caller)
        plan = self._store.begin(wanted)
        upload = plan.upload
        if upload is None:
            self._stores.note(wanted.chain, plan.held_tokens, 0, plan.reason, wanted.isolated)
            return plan, pb.BeginStoreReply(
                reason=plan.reason,
                held_tokens=plan.held_tokens,
                durable=plan.reason is Reason.ALREADY_STORED,
                detail=plan.detail,
            )
        by_socket = request.message.transport == pb.TRANSPORT_PATH and self._same_host and not wanted.isolated
        return plan, pb.BeginStoreReply(
            upload_id=upload.upload_id,
            start=upload.start,
            end=upload.n_tokens,  # of a deferred store before the last token
            upload_bytes=upload.upload_bytes,
            by_socket=by_socket and upload.encryption is None and upload.upload_bytes > 0,
            reason=plan.reason,
            held_tokens=plan.held_tokens,
            wants_states=bool(upload.states),
            detail=plan.detail,
        )

    def _forget(self, planning: asyncio.Future[tuple[StorePlan, pb.BeginStoreReply]]) -> None:
        """Give up the upload of a call that has gone away."""
        if not planning.cancelled() and planning.exception() is None and (upload := planning.result()[0].upload):
            self._threads.release.post(self._store.uploads.give_up, upload)

    @unary
    async def Upload(self, request_iterator: AsyncIterator[UploadBytes], context: Context) -> pb.UploadReply:
        buffers, idle_s = self._store.receiver.buffers, self._config.limits.upload_idle_s
        stream = StreamIn(self._store.uploads, self._stores.begin, buffers, idle_s)
        whole = False
        try:
            received = await stream.receive(request_iterator)
            whole = True
            return pb.UploadReply(received_bytes=received)
        finally:
            if stream.upload is not None and not whole:
                await self._stores.give_up(stream.upload)

    @streaming
    async def CommitStore(self, request: pb.CommitStoreRequest, context: Context) -> AsyncIterator[pb.CommitStoreReply]:
        task = self._stores.commit(request.upload_id)
        yield pb.CommitStoreReply(reason=Reason.OK)
        outcome = await asyncio.shield(task)
        yield pb.CommitStoreReply(
            done=True,
            durable=outcome.durable,
            stored_tokens=outcome.stored_tokens,
            new_bytes=outcome.new_bytes,
            reason=outcome.reason,
        )

    @unary
    async def AbortStore(self, request: pb.AbortStoreRequest, context: Context) -> pb.AbortStoreReply:
        await self._stores.abort(request.upload_id)
        return pb.AbortStoreReply()

    @unary
    async def Report(self, request: pb.ReportRequest, context: Context) -> pb.ReportReply:
        if request.HasField("timing"):
            said, caller = request.timing, caller_name(context.invocation_metadata())
            timing = Timing(said.read_bytes, said.read_s, said.decoded_bytes, said.decode_s)
            self._fetch.costs.reported(said.fetch_id, timing, caller)
            self._requests.reported(said.fetch_id, Outcome(said.got_tokens, said.reason, said.again))
            return pb.ReportReply()
        if request.HasField("speed"):
            self._requests.computes(request.speed.namespace_id, request.speed.tokens_per_s)
            return pb.ReportReply()
        if request.reason and not request.key:
            self._counters.stored(known_reason(request.reason))
            return pb.ReportReply()
        if len(request.key) != KEY_BYTES:
            raise InvalidRequestError(f"a block key has {KEY_BYTES} bytes, got {len(request.key)}")
        return pb.ReportReply(quarantined=await self._threads.stream(self._engine.recheck, request.key))

    def end_leases(self) -> None:
        """Let go of what waits for workers; called once, when the daemon is told to stop."""
        self._stopping.set()
