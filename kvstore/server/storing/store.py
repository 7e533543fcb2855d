"""STORE: plan what a worker must send, take it, and turn it into blocks.

begin      index only: what is held, what others are sending, what is wanted from this worker
carry_out  receive -> validate -> splice -> threshold -> encode -> blob under a temporary name, a block at a time as
           its bytes arrive; then, when the worker commits, names and one index commit
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from kvstore.codecs.profiles import AUTO
from kvstore.config import Config
from kvstore.core.blocks import (
    BLOCK_TOKENS,
    FIDELITY_ANY,
    FIDELITY_EXACT,
    TOKEN_BYTES,
    Reason,
)
from kvstore.core.byte_budget import ByteBudget
from kvstore.core.keys import NamespaceInfo
from kvstore.core.layers import cut_pieces
from kvstore.core.rules import check_states
from kvstore.engine import Engine, Match, NamespaceKey, NewBlock
from kvstore.errors import (
    AuxMissingError,
    CorruptDataError,
    InvalidRequestError,
    KeyMissingError,
    KVStoreError,
    LimitError,
    NotFoundError,
    StoreFullError,
    UnavailableError,
)
from kvstore.server.asked_prompt import StoreRequest
from kvstore.server.lane import Lane
from kvstore.server.policy.admission import DETAILS, store_admission
from kvstore.server.policy.gate import Gate, ProfileChoice
from kvstore.server.policy.pressure import Watermark
from kvstore.server.storing.receive import Receiver
from kvstore.server.storing.uploads import RETRY_S, Shares, Upload, Uploads

# Of the bytes that all uploads may have, this part is one client's, where it has more than one upload.
CALLER_SHARE = 4


@dataclass(frozen=True)
class StorePlan:
    """The answer to a StoreRequest. `upload` is None when there is nothing to wait for."""

    upload: Upload | None
    held_tokens: int
    reason: Reason
    detail: str = ""


@dataclass(frozen=True)
class StoreOutcome:
    """The end of a store: leading tokens now in the store, bytes written for them, why not more, whether they last."""

    stored_tokens: int
    new_bytes: int
    reason: Reason
    durable: bool


class StorePath:
    """Plans and carries out stores, on threads: `begin` blocks on the index, `carry_out` on the worker and the disk."""

    def __init__(self, engine: Engine, lane: Lane, config: Config, buffers: ByteBudget | None = None) -> None:
        """`buffers`: the daemon's memory_bytes."""
        self._engine = engine
        self._config = config
        self.receiver = Receiver(engine, lane, config, buffers or ByteBudget(config.memory_bytes))
        self.watermark = Watermark(engine)
        self.gate = Gate(engine.quality, config.profile, self.watermark, engine.has_aux)
        self.admission = store_admission(engine, config)
        self.uploads = Uploads(config.limits.uploads_max)
        self._shares = Shares(self._share_bytes, CALLER_SHARE)

    def give_up(self) -> None:
        """End also what is committed and does not end by itself: the daemon must stop."""
        for upload in self.uploads.under_way():
            upload.intake.give_up(UnavailableError("the daemon is stopping"), even_committed=True)

    def end_evicted(self) -> None:
        """After an eviction: give up the uploads that it takes along, and those whose base it removed."""
        for upload in self.uploads.under_way():
            if self._is_evicted(upload):
                self.uploads.give_up(upload)

    def _is_evicted(self, upload: Upload) -> bool:
        """Whether what it brings was evicted since it began, or a block that it continues is gone."""
        if self._engine.is_evicted(upload.chain.root, upload.evictions, upload.keys):
            return True
        continues = [piece.row.key for piece in upload.spliced]
        if upload.first_block and not upload.depends_on:
            continues.append(upload.keys[upload.first_block - 1])
        return not all(map(self._engine.holds, continues))

    # -- begin ---------------------------------------------------------------------------------------------------

    def begin(self, request: StoreRequest) -> StorePlan:
        """Decide what is wanted and open an upload for it.

        Raises NotFoundError (namespace unknown and no layout sent), LayoutMismatchError, InvalidRequestError,
        LimitError (too many tokens or uploads).
        """
        evictions = self._engine.evictions  # before anything that is held is looked up
        namespace = self._engine.namespace(request.chain.root) or request.namespace
        if namespace is None:
            raise NotFoundError("unknown namespace: send its layout with the first store")
        n_tokens = request.chain.n_tokens
        self._check(request, namespace)
        if n_tokens < self._config.limits.min_prefix_tokens:
            return StorePlan(None, 0, Reason.BELOW_THRESHOLD)
        choice = self.gate.choose(request.chain.root, request.profile)
        if choice.refused and request.profile:
            return StorePlan(None, 0, Reason.PROFILE_REFUSED, choice.refused)
        named = request.profile not in ("", AUTO)
        floor = choice.profile.fidelity if named else FIDELITY_ANY
        try:
            encryption = self.encryption(request.chain.root, isolated=request.isolated)
        except KeyMissingError as error:
            return StorePlan(None, 0, Reason.KEY_MISSING, str(error))
        held = self._engine.match(request.chain, floor, n_tokens)
        admitted = self._admitted_tokens(request, namespace, held)
        if admitted < n_tokens:
            return self._begin_part(request, namespace, held, admitted)
        if not choice.auto:
            self._engine.reencoder.claim([piece.row.key for piece in held.slices])
        upload = self._plan(request, namespace, choice, floor, held)
        upload.encryption, upload.evictions = encryption, evictions
        if held.n_tokens == n_tokens and not upload.states and not upload.depends_on:
            self._engine.touch(held.slices)
            durable = self._engine.await_durable()
            return StorePlan(None, n_tokens, Reason.ALREADY_STORED if durable else Reason.STORE_FULL)
        if upload.pieces and request.captured_from > upload.start:
            return StorePlan(None, held.n_tokens, Reason.NOT_CAPTURED)
        self._engine.touch(held.slices)
        if upload.wants_bytes and (refusal := self.admission.refusal()) is not Reason.OK:
            self.admission.hold_back(upload.upload_bytes)
            # Read-only is what a person wants: workers do not complain of it.
            detail = "" if refusal is Reason.READ_ONLY else DETAILS[refusal]
            return StorePlan(None, held.n_tokens, refusal, detail)
        if not self._open(upload, request.caller):
            return StorePlan(None, held.n_tokens, Reason.STORE_FULL, self._engine.degraded)
        return StorePlan(upload, min(upload.start, n_tokens), Reason.OK, choice.warning)

    def _admitted_tokens(self, request: StoreRequest, namespace: NamespaceInfo, held: Match) -> int:
        """How many leading tokens may be written now: all, but where the worker's memory keeps the rest for now.

        Those that another prompt offered, too, or found in the worker's memory. A sequence with window or state layers
        is of use only as a whole, with its checkpoint.
        """
        chain, exact = request.chain, namespace.layout.exact_layers
        n_tokens = chain.n_tokens
        lacks_states = bool(request.states) and self._engine.checkpoint_at(chain) is None
        is_missing = held.n_tokens < n_tokens or lacks_states
        if not (request.prompt and is_missing and self.admission.is_staged):
            return n_tokens
        keys = (*chain.block_keys(), chain.checkpoint_key()) if exact else chain.block_keys()
        seen = self._engine.mark(keys, request.prompt)
        if seen == len(keys) or request.touched_tokens >= n_tokens:
            return n_tokens
        return 0 if exact else max(seen, request.touched_tokens // BLOCK_TOKENS) * BLOCK_TOKENS

    def _begin_part(self, request: StoreRequest, namespace: NamespaceInfo, held: Match, n_tokens: int) -> StorePlan:
        """Take this many leading tokens; the worker keeps the others, and offers them again."""
        part = max(n_tokens, held.n_tokens)
        self.admission.hold_back((request.chain.n_tokens - part) * namespace.layout.token_bytes)
        if n_tokens <= max(held.n_tokens, request.captured_from):
            self._engine.touch(held.slices)
            return StorePlan(None, held.n_tokens, Reason.DEFERRED)
        chain, restored = request.chain.head(n_tokens), min(request.restored_tokens, n_tokens)
        plan = self.begin(replace(request, chain=chain, restored_tokens=restored, states=(), prompt=0))
        is_well = plan.reason in (Reason.OK, Reason.ALREADY_STORED)
        return replace(plan, reason=Reason.DEFERRED) if is_well else plan

    def encryption(self, root: bytes, *, isolated: bool) -> NamespaceKey | None:
        """The key of an encrypted namespace; before the first store of one that is to be, a new key.

        KeyMissingError while the keys of what is stored are missing.
        """
        return self._engine.encrypt(root) if self.is_to_encrypt(root, isolated=isolated) else None

    def is_to_encrypt(self, root: bytes, *, isolated: bool) -> bool:
        """Whether what is stored in a namespace is to be encrypted."""
        wanted = self._config.encrypt == "all" or (self._config.encrypt == "tenants" and isolated)
        return wanted or self._engine.is_encrypted(root)

    def _check(self, request: StoreRequest, namespace: NamespaceInfo) -> None:
        """Raises InvalidRequestError, LimitError."""
        n_tokens = request.chain.n_tokens
        if len(request.chain.tokens) % TOKEN_BYTES:
            raise InvalidRequestError(f"tokens must be {TOKEN_BYTES} bytes each, got {len(request.chain.tokens)} bytes")
        if not n_tokens:
            raise InvalidRequestError("no tokens to store")
        if n_tokens > self._config.limits.tokens_max:
            words = f"{n_tokens} tokens are more than tokens_max = {self._config.limits.tokens_max}"
            raise LimitError(words, limit="tokens_max")
        if request.captured_from > n_tokens or request.restored_tokens > n_tokens:
            raise InvalidRequestError("captured_from and restored_tokens must lie within the tokens")
        if request.restored_fidelity > FIDELITY_EXACT:
            raise InvalidRequestError(f"no fidelity is higher than {FIDELITY_EXACT}, got {request.restored_fidelity}")
        if request.restored_tokens and not request.restored_fidelity:
            # Not said, it would count as first-hand.
            raise InvalidRequestError("restored_tokens without their restored_fidelity")
        if not request.states:
            return
        try:
            check_states(namespace.layout, request.states, n_tokens)
        except CorruptDataError as error:
            raise InvalidRequestError(f"states: {error}") from error
        nbytes = sum(state.nbytes for state in request.states)
        if nbytes > self._config.memory_bytes:
            words = f"a checkpoint of {nbytes} bytes is more than memory_bytes = {self._config.memory_bytes}"
            raise LimitError(words, limit="memory_bytes")

    def _plan(
        self, request: StoreRequest, namespace: NamespaceInfo, choice: ProfileChoice, floor: int, held: Match
    ) -> Upload:
        n_tokens = request.chain.n_tokens
        keys = tuple(request.chain.block_keys())
        full = sum(1 for piece in held.slices if piece.take == BLOCK_TOKENS)
        first, depends_on = self.uploads.receiving(keys, full, floor)
        spliced = held.slices[full:] if first == full else ()
        start = min(first * BLOCK_TOKENS + sum(piece.take for piece in spliced), n_tokens)
        known = self._engine.checkpoint_at(request.chain) if request.states else None
        sender = self.uploads.sender_of(request.chain.checkpoint_key(), floor) if request.states else None
        held_states = known is not None and known.fidelity >= floor
        if known is not None and held_states and not request.interim:
            self._engine.mark_end(known)
        return Upload(
            namespace=namespace,
            chain=request.chain,
            choice=choice,
            floor=floor,
            # Of what the worker restored, and so at best of all that it computed after it.
            restored_fidelity=request.restored_fidelity if request.restored_tokens else FIDELITY_EXACT,
            first_block=first,
            spliced=spliced,
            pieces=tuple(cut_pieces(start, n_tokens, request.restored_tokens)) if start < n_tokens else (),
            states=() if held_states or sender else request.states,
            interim=request.interim,
            telemetry=request.telemetry,
            isolated=request.isolated,
            depends_on=tuple(dict.fromkeys((*depends_on, sender))) if sender and not held_states else depends_on,
            awaits_checkpoint=not held_states and sender is not None,
        )

    def _share_bytes(self) -> int:
        """Most bytes that uploads may have under way: a part of the budget in force."""
        return self._engine.budget_bytes * self._config.limits.upload_share_percent // 100

    def _open(self, upload: Upload, caller: str) -> bool:
        """List the upload; False when there can be no room for it. Evicts nothing yet."""
        nbytes = upload.upload_bytes
        if nbytes > self._share_bytes() or not self._engine.could_make_room(nbytes):
            return False
        if (buffer := self.receiver.buffer_bytes(upload)) > (most := self.receiver.buffers.limit_bytes):
            words = f"a block of {buffer} bytes is more than memory_bytes = {most}"
            raise LimitError(words, limit="memory_bytes")
        if (share := self._shares.try_acquire(caller, nbytes)) is not None:
            words = f"{share} bytes of uploads are under way, in all or of one client; try again later"
            raise LimitError(words, RETRY_S, "upload_share_percent")
        held = contextlib.ExitStack()
        upload.release = held.close
        held.callback(self._shares.release, caller, nbytes)
        try:
            if upload.spliced:
                held.callback(self._engine.lease([piece.row for piece in upload.spliced]).release)
            self.uploads.add(upload)
        except BaseException:
            held.close()
            raise
        return True

    # -- carry out -----------------------------------------------------------------------------------------------

    def carry_out(self, upload: Upload) -> StoreOutcome:
        """Receive, encode, write, and commit when the worker does; always ends the upload.

        Uploads that it depends on have ended. Raises InvalidRequestError for bytes that are not what was asked for,
        DeadlineError for a worker that stalls, LimitError without memory, NotFoundError when it was given up; then
        nothing of the upload is stored, and nothing of it is left.
        """
        try:
            return self._carry_out(upload)
        except StoreFullError:
            upload.intake.await_commit()
            return StoreOutcome(0, 0, Reason.STORE_FULL, durable=False)
        except KVStoreError as error:
            self.uploads.end(upload, error)
            raise
        finally:
            upload.intake.close()
            self.uploads.end(upload)

    def _carry_out(self, upload: Upload) -> StoreOutcome:
        floor = upload.floor
        needed = min(upload.first_block * BLOCK_TOKENS, upload.n_tokens)
        before = self._engine.match(upload.chain, floor, needed)
        new_bytes, reason = 0, Reason.OK
        if self._is_evicted(upload):
            reason = Reason.EVICTED
        elif before.n_tokens < needed:
            reason = _why_less(before)
        elif upload.wants_bytes:
            new_bytes, reason = self._write(upload, before.fidelity)
        upload.intake.await_commit()
        after = self._engine.match(upload.chain, floor, upload.n_tokens)
        self._engine.touch(after.parts)
        if not upload.choice.auto:
            self._engine.reencoder.claim([piece.row.key for piece in after.slices])
        if after.n_tokens < upload.n_tokens and reason is Reason.OK:
            reason = _why_less(after)
        if reason in DETAILS:
            self.admission.hold_back((upload.n_tokens - after.n_tokens) * upload.layout.token_bytes)
        if upload.awaits_checkpoint and reason is Reason.OK:
            row = self._engine.checkpoint_at(upload.chain)
            if row is None or row.fidelity < floor:
                reason = Reason.FIDELITY if row else Reason.DEPENDENCY_LOST
        # Part of it may be what another upload committed a moment ago.
        return StoreOutcome(after.n_tokens, new_bytes, reason, self._engine.await_durable())

    def _write(self, upload: Upload, fidelity: int) -> tuple[int, Reason]:
        """Hand the blocks to the engine. Codes that can no longer be spliced cost the store, not the worker."""
        try:
            with self.receiver.memory(upload) as memory:
                receipt = self._engine.store(
                    upload.namespace.to_record(),
                    self._admitted(upload, self.receiver.blocks(upload, fidelity, memory)),
                    # A spliced block may be another sequence's tail: nothing may make room for what needs it.
                    protect=[*upload.keys, *upload.new_keys, *(piece.row.key for piece in upload.spliced)],
                    encryption=upload.encryption,
                    since=upload.evictions,
                    agreed=upload.intake.await_commit,
                    ahead=len(memory) - 1,
                )
        except AuxMissingError:
            return 0, Reason.NO_BASIS
        except CorruptDataError:
            evicted = [piece for piece in upload.spliced if not self._engine.holds(piece.row.key)]
            for piece in upload.spliced:
                self._engine.recheck(piece.row.key)
            return 0, Reason.EVICTED if evicted else Reason.CORRUPT
        return receipt.new_bytes, upload.refusal if receipt.reason is Reason.OK else receipt.reason

    def _admitted(self, upload: Upload, blocks: Iterable[NewBlock]) -> Iterator[NewBlock]:
        """The blocks of a store, as long as they may be written: then it ends, and `upload.refusal` says why.

        A checkpoint follows the blocks that it continues: without it they are of no use, so it is written with them.
        """
        for new in blocks:
            refusal = self.admission.refusal()
            if refusal is not Reason.OK and not new.block.is_checkpoint:
                upload.refusal = refusal
                return
            yield new


def _why_less(match: Match) -> Reason:
    """Why a store has less than it should: it is there at a lower rank than was asked for, or it went away."""
    return Reason.FIDELITY if match.reason is Reason.FIDELITY else Reason.DEPENDENCY_LOST
