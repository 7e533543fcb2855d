"""RPC handlers of KVStore: they turn messages into values, run what blocks on `threads.py`, and decide nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from kvstore.config import Config
from kvstore.core.blocks import KEY_BYTES, Reason
from kvstore.core.breaker import Deadline
from kvstore.core.keys import Chain
from kvstore.core.layers import Layout
from kvstore.core.remote_words import RemoteReason
from kvstore.engine import Engine
from kvstore.engine import Match as Matched
from kvstore.errors import InvalidRequestError
from kvstore.server.asked_prompt import AskedPrompt, store_request
from kvstore.server.calls.callers import Identities, calling
from kvstore.server.calls.rpc_errors import Context
from kvstore.server.counters import Counters, Telemetry
from kvstore.server.fetching.costs import Offer, Timing, Way
from kvstore.server.fetching.fetch import FetchPath, FetchPlan
from kvstore.server.fetching.layer_frames import LayerFrames, plan_message
from kvstore.server.fetching.stream_out import Sender
from kvstore.server.notes import Notes
from kvstore.server.storing.store import StorePath, StorePlan
from kvstore.server.storing.stores import Stores
from kvstore.server.storing.stream_in import StreamIn
from kvstore.server.threads import Threads
from kvstore.server.tier.remote_choice import PREFILL_TOKENS_PER_S, TIME_SHARE, Want
from kvstore.server.tier.remote_path import BEATS, Promoted
from kvstore.server.tier.remote_tier import Remote
from kvstore.telemetry.requests import Outcome
from kvstore.telemetry.why import StoreEnd
from kvstore.wire.frames import CHUNK_BYTES, PromptRequest, UploadBytes
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc

# Turns of the event loop between the moment a caller goes away and the CancelledError in its handler. Once the reply is
# on its way, gRPC does not say whether it was read or lost: its callbacks have no code for that, and no handler learns
# of the end of a connection. An upload whose reply was lost is given up like any other that is idle.
CANCEL_TURNS = 3


@dataclass(frozen=True)
class _Planned:
    """A fetch that is ready to be carried out: its plan, and the first message of the reply."""

    plan: FetchPlan
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
        self._notes = Notes(threads.note)
        self._telemetry, self._silent = telemetry, telemetry.silent(engine)
        self._config = config
        self._same_host = bool(config.address.path)
        self._identities = Identities()
        self._stopping = asyncio.Event()

    async def Match(self, request: PromptRequest, context: Context) -> pb.MatchReply:
        prompt = self._prompt(request, "match")
        match, offer = await self._threads.read(self._match, prompt)
        n_tokens, reason = match.n_tokens, match.reason
        if self._remote.path is not None:
            want = self._want(prompt, match, offer, context)
            n_tokens = await self._remote.path.reach(want)
            reason = Reason.OK if n_tokens == want.limit else reason
        asyncio.get_running_loop().call_soon(self._note_match, prompt, match, n_tokens, reason)
        return pb.MatchReply(n_tokens=n_tokens, reason=reason, fidelity=match.fidelity)

    def _match(self, prompt: AskedPrompt) -> tuple[Matched, Offer]:
        """The answer, and at what speed and by which way it is worth that."""
        offer = self._offer(prompt, pb.TRANSPORT_PATH, dense=False)
        match = self._fetch.match(prompt.chain, prompt.message.fidelity_min, offer)
        _ = match.fidelity  # worked out here, off the loop
        return match, offer

    def _note_match(self, prompt: AskedPrompt, match: Matched, n_tokens: int, reason: Reason) -> None:
        """Note a match, once its answer is under way."""
        prompt.telemetry.requests.matched(prompt.asked, n_tokens, reason)
        self._notes.add(prompt, match)

    def _offer(self, prompt: AskedPrompt, transport: pb.Transport, *, dense: bool) -> Offer:
        """What the worker says of itself, and how the bytes would go to it. Not on the loop: a key may be read."""
        message = prompt.message
        way = self._fetch.way(prompt.identity, transport, dense=dense)
        return Offer(message.prefill_tokens_per_s, message.covered_tokens, way)

    def _want(self, prompt: AskedPrompt, match: Matched, offer: Offer, context: Context) -> Want:
        """What a request may want of the remote tier."""
        message, chain = prompt.message, prompt.chain
        left_s = min(context.time_remaining() or 0.0, self._config.fetch_total_ms / 1e3)
        known = self._telemetry.requests.traffic.speed(chain.root)
        speed = offer.prefill_tokens_per_s or known or PREFILL_TOKENS_PER_S
        deadline = Deadline(TIME_SHARE * left_s)
        return Want(message.namespace, chain, match, offer, message.fidelity_min, speed, deadline)

    async def Fetch(self, request: PromptRequest, context: Context) -> AsyncIterator[pb.FetchReply]:
        prompt = self._prompt(request, "fetch")
        counters, requests = prompt.telemetry.counters, prompt.telemetry.requests
        planned, remote_tokens = await self._planned(prompt, context)
        plan, way, message = planned.plan, planned.offer.way, planned.message
        complete = False
        try:
            counters.add("tokens_served", plan.match.n_tokens)
            nbytes = sum(piece.row.blob_bytes for piece in plan.match.parts)
            requests.fetched(prompt.asked, plan.fetch_id, plan.match.n_tokens, plan.match.reason, nbytes, remote_tokens)
            if plan.match.slices and prompt.telemetry.is_real:
                requests.traffic.ended_in(plan.match.slices[-1].row.key)
                if self._remote.path is not None:
                    self._remote.push([plan.match.slices[-1].row.key, plan.match.parts[-1].row.key])
            yield message
            if plan.namespace is None:
                return
            if way == "path":
                counters.add("bytes_served", nbytes)
                # The lease lasts while the worker is connected, at most `lease_s`. A stop of the daemon ends it.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), self._config.limits.lease_s)
            else:
                await self._stream(plan, plan.namespace.layout, way, counters, context)
                complete = True
        finally:
            requests.handed_over(plan.fetch_id, complete=complete, by_path=way == "path")
            self._threads.release.post(plan.release)
            if way != "path":  # by path the worker is still reading
                self._fetch.costs.end(plan.fetch_id)

    async def FetchBasis(self, request: pb.FetchBasisRequest, context: Context) -> AsyncIterator[pb.BasisPiece]:
        root = self._identities.of(request.namespace).root
        found = await self._threads.stream(self._engine.aux, root, (request.digest,))
        data = memoryview(found[request.digest])
        for at in range(0, len(data), CHUNK_BYTES):
            yield pb.BasisPiece(data=bytes(data[at : at + CHUNK_BYTES]))

    async def _planned(self, prompt: AskedPrompt, context: Context) -> tuple[_Planned, int]:
        """A plan, and how many of its tokens were read from the remote tier for it."""
        planned = longer = await self._plan_on_thread(prompt)
        said: str = ""
        try:
            path, stall_s = self._remote.path, prompt.message.stall_ms / 1e3
            if path is None or not stall_s or not prompt.telemetry.is_real:
                return planned, 0
            want = self._want(prompt, planned.plan.match, planned.offer, context)
            if not want.may_gain:
                return planned, 0

            async def match() -> Matched:
                fidelity_min = prompt.message.fidelity_min
                return await self._threads.read(self._fetch.match, prompt.chain, fidelity_min, planned.offer)

            async def beat() -> None:
                await context.write(pb.FetchReply())

            gained, promoted = 0, Promoted(False, path.why_not(want))
            if promoted.why is None:
                # What the plan found stays leased: nothing that is read makes room by evicting it.
                with contextlib.ExitStack() as stack:
                    stack.callback(self._release_planned, planned)
                    promoted = await path.promote(want, match, beat, stall_s / BEATS)
                    if promoted.more:
                        longer = await self._plan_on_thread(prompt)
                    else:
                        stack.pop_all()
                gained = max(0, longer.plan.match.n_tokens - planned.plan.match.n_tokens)
            self._remote.served(gained, promoted)
            said = RemoteReason.HIT if gained else promoted.why or ""
            return longer, gained
        finally:
            asyncio.get_running_loop().call_soon(self._notes.add, prompt, longer.plan.match, said)

    async def _plan_on_thread(self, prompt: AskedPrompt) -> _Planned:
        planning = self._threads.read(self._plan, prompt)
        try:
            return await asyncio.shield(planning)
        except asyncio.CancelledError:
            # The thread goes on and takes a lease that no call needs: release it as soon as it is taken.
            planning.add_done_callback(self._release_late)
            raise

    def _plan(self, prompt: AskedPrompt) -> _Planned:
        """A plan, how its bytes will go, and the message that says so."""
        message, caller, is_counted = prompt.message, prompt.peer.name, prompt.telemetry.is_real
        offer = self._offer(prompt, message.transport, dense=message.representation == pb.REPRESENTATION_DENSE)
        plan = self._fetch.plan(prompt.chain, message.fidelity_min, offer, caller, is_counted=is_counted)
        try:
            return _Planned(plan, offer, pb.FetchReply(plan=plan_message(self._engine, plan, offer.way)))
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

    async def _stream(self, plan: FetchPlan, layout: Layout, way: Way, counters: Counters, context: Context) -> None:
        make, run = (
            (self._layers.dense, self._threads.decode)
            if way == "dense"
            else (self._layers.packed, self._threads.stream)
        )
        sender = Sender(make(plan, layout), run)
        try:
            await sender.send(context)
            self._fetch.measured(plan)
        finally:
            counters.add("bytes_served", sender.sent_bytes)
            await asyncio.shield(sender.close())

    def _telemetry_of_call(self) -> Telemetry:
        """Where this call is noted: a probe's nowhere."""
        return self._silent if calling.get().is_probe else self._telemetry

    def _prompt(self, request: PromptRequest, kind: str) -> AskedPrompt:
        """A request about a prompt, counted as one of this kind. Raises InvalidRequestError for an invalid identity."""
        telemetry = self._telemetry_of_call()
        telemetry.counters.add(kind)
        identity = self._identities.of(request.message.namespace)
        chain, since = Chain(identity.root, request.tokens), self._engine.nearest.since
        return AskedPrompt(request.message, chain, identity, calling.get(), telemetry, since)

    async def BeginStore(self, request: PromptRequest, context: Context) -> pb.BeginStoreReply:
        telemetry = self._telemetry_of_call()
        counters, requests = telemetry.counters, telemetry.requests
        asked = planning = None
        try:
            prompt = self._prompt(request, "store")
            asked = prompt.asked
            await self._notes.await_before_store()
            planning = self._threads.plan(self._begin, prompt)
            plan, reply = await asyncio.shield(planning)
            for _ in range(CANCEL_TURNS):
                await asyncio.sleep(0)
        except InvalidRequestError:
            counters.stored(Reason.INVALID)
            if asked is not None:
                requests.not_stored(asked, 0, Reason.INVALID)
            raise
        except asyncio.CancelledError:
            # The caller will not learn of the upload that the thread opened or is about to open.
            if planning is not None:
                planning.add_done_callback(self._forget)
            raise
        counters.stored(plan.reason)
        if plan.upload is None:
            requests.not_stored(asked, plan.held_tokens, plan.reason)
        else:
            requests.begun(asked, reply.upload_id, plan.upload.start)
        return reply

    def _begin(self, prompt: AskedPrompt) -> tuple[StorePlan, pb.BeginStoreReply]:
        """A plan, and the message that says so."""
        wanted = store_request(prompt, self._engine.namespace(prompt.chain.root))
        plan = self._store.begin(wanted)
        upload = plan.upload
        if upload is None:
            end = StoreEnd(wanted.chain.n_tokens, plan.held_tokens, 0, plan.reason)
            prompt.telemetry.why.stored(wanted.chain, end, private=wanted.isolated)
            return plan, pb.BeginStoreReply(
                reason=plan.reason,
                held_tokens=plan.held_tokens,
                durable=plan.reason is Reason.ALREADY_STORED,
                detail=plan.detail,
            )
        by_socket = prompt.message.transport == pb.TRANSPORT_PATH and self._same_host and not wanted.isolated
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

    async def CommitStore(self, request: pb.CommitStoreRequest, context: Context) -> AsyncIterator[pb.CommitStoreReply]:
        task = await self._stores.commit(request.upload_id)
        try:
            yield pb.CommitStoreReply(reason=Reason.OK)
            outcome = await asyncio.shield(task)
        except (asyncio.CancelledError, GeneratorExit):  # the latter where the first reply could not be written
            self._stores.worker_left(request.upload_id)
            raise
        yield pb.CommitStoreReply(
            done=True,
            durable=outcome.durable,
            stored_tokens=outcome.stored_tokens,
            new_bytes=outcome.new_bytes,
            reason=outcome.reason,
        )

    async def AbortStore(self, request: pb.AbortStoreRequest, context: Context) -> pb.AbortStoreReply:
        await self._stores.abort(request.upload_id)
        return pb.AbortStoreReply()

    async def Report(self, request: pb.ReportRequest, context: Context) -> pb.ReportReply:
        telemetry = self._telemetry_of_call()
        if request.HasField("timing"):
            said = request.timing
            timing = Timing(said.read_bytes, said.read_s, said.decoded_bytes, said.decode_s)
            self._fetch.costs.reported(said.fetch_id, timing, calling.get().name)
            telemetry.requests.reported(said.fetch_id, Outcome(said.got_tokens, said.reason, said.again))
            return pb.ReportReply()
        if request.HasField("speed"):
            telemetry.requests.computes(request.speed.namespace_id, request.speed.tokens_per_s)
            return pb.ReportReply()
        if request.reason and not request.key:
            telemetry.counters.stored(Reason.of(request.reason, Reason.INVALID))
            return pb.ReportReply()
        if len(request.key) != KEY_BYTES:
            raise InvalidRequestError(f"a block key has {KEY_BYTES} bytes, got {len(request.key)}")
        return pb.ReportReply(quarantined=await self._threads.stream(self._engine.recheck, request.key))

    def end_leases(self) -> None:
        """Let go of what waits for workers; called once, when the daemon is told to stop."""
        self._stopping.set()
