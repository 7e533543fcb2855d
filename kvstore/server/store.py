"""STORE: plan what a worker must send, take it, and turn it into blocks.

    begin    index only: what is held, what others are sending, what is wanted from this worker
    (bytes)  into a staging file, by the worker itself (path) or by the Upload handler (stream)
    commit   validate -> splice -> threshold -> encode, a block at a time -> blobs -> one index commit

Memory: one block of raw KV and its encoded form at a time. What came out of the store is never quantized a second time:
restored tokens are spliced from the daemon's own codes, or kept raw at the rank they were served with.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from kvstore.codecs import device
from kvstore.codecs.encode import encode_runs, is_first_hand
from kvstore.codecs.profiles import AUTO, Profile
from kvstore.codecs.runs import EncodedRun, join_runs, load_run, narrow_run, pack_run, payload_run
from kvstore.config import Config
from kvstore.core.blocks import (
    BLOCK_TOKENS,
    FIDELITY_ANY,
    FIDELITY_EXACT,
    TOKEN_BYTES,
    Block,
    LayerState,
    Reason,
)
from kvstore.core.byte_budget import ByteBudget
from kvstore.core.keys import Chain, NamespaceInfo
from kvstore.core.layers import Piece, cut_pieces
from kvstore.core.rules import check_states
from kvstore.engine import Engine, Match, NamespaceKey, NewBlock
from kvstore.errors import (
    CorruptDataError,
    InvalidRequestError,
    KeyMissingError,
    LimitError,
    NotFoundError,
    StoreFullError,
    UnavailableError,
)
from kvstore.server.booking import Booking, Shares
from kvstore.server.gate import Gate
from kvstore.server.lane import Lane
from kvstore.server.staging import StagingFile
from kvstore.server.uploads import RETRY_S, Upload, Uploads, block_range

T = TypeVar("T")

# Of the bytes that all uploads may have, this part is one client's, where it has more than one upload.
CALLER_SHARE = 4


@dataclass(frozen=True)
class StoreRequest:
    """What BeginStore asks, validated as far as it can be without the index."""

    chain: Chain
    namespace: NamespaceInfo | None  # None when the worker sent no layout
    captured_from: int
    restored_tokens: int
    restored_fidelity: int
    profile: str
    isolated: bool = False  # a tenant with a salt of its own
    caller: str = ""  # the name that the client gives itself
    states: tuple[LayerState, ...] = ()


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
    """Plans and carries out stores. `begin` and `commit` block on disk: call them on worker threads, any of them."""

    def __init__(self, engine: Engine, lane: Lane, config: Config, staging_dir: Path) -> None:
        self._engine = engine
        self._lane = lane
        self._config = config
        self._staging_dir = staging_dir
        self.gate = Gate(engine.quality, config.profile)
        self.uploads = Uploads(config.limits.uploads_max)
        self._staged = ByteBudget(engine.budget_bytes * config.limits.staging_share_percent // 100)
        self._shares = Shares(self._staged.limit_bytes // CALLER_SHARE)
        self._given_up = False
        self.tokens_stored = 0

    def give_up(self) -> None:
        """End the commit that is running at its next block, and refuse further ones: the daemon must stop."""
        self._given_up = True

    # -- begin ---------------------------------------------------------------------------------------------------

    def begin(self, request: StoreRequest) -> StorePlan:
        """Decide what is wanted and open an upload for it.

        Raises NotFoundError (namespace unknown and no layout sent), LayoutMismatchError, InvalidRequestError,
        LimitError (too many tokens or uploads).
        """
        evictions = self._engine.evictions  # before anything that is held is looked up
        namespace = self._namespace(request)
        n_tokens = request.chain.n_tokens
        self._check_tokens(request, n_tokens)
        self._check_states(request, namespace)
        if n_tokens < self._config.limits.min_prefix_tokens:
            return StorePlan(None, 0, Reason.BELOW_THRESHOLD)
        choice = self.gate.choose(request.chain.root, request.profile)
        if choice.refused and request.profile:
            return StorePlan(None, 0, Reason.PROFILE_REFUSED, choice.refused)
        profile, named = choice.profile, request.profile not in ("", AUTO)
        floor = profile.fidelity if named else FIDELITY_ANY
        try:
            encryption = self._encryption(request)
        except KeyMissingError as error:
            return StorePlan(None, 0, Reason.KEY_MISSING, str(error))
        held = self._engine.match(request.chain, floor, n_tokens)
        upload = self._plan(request, namespace, profile, floor, held)
        upload.encryption, upload.evictions = encryption, evictions
        if held.n_tokens == n_tokens and not upload.states and not upload.depends_on:
            self._engine.touch(held.slices)
            durable = self._engine.await_durable()
            return StorePlan(None, n_tokens, Reason.ALREADY_STORED if durable else Reason.STORE_FULL)
        if upload.pieces and request.captured_from > upload.start:
            return StorePlan(None, held.n_tokens, Reason.NOT_CAPTURED)
        self._engine.touch(held.slices)
        if not self._open(upload, request.caller):
            return StorePlan(None, held.n_tokens, Reason.STORE_FULL, self._engine.degraded)
        return StorePlan(upload, min(upload.start, n_tokens), Reason.OK, choice.warning)

    def _encryption(self, request: StoreRequest) -> NamespaceKey | None:
        """The key of an encrypted namespace; before the first store of one that is to be, a new key."""
        wanted = self._config.encrypt == "all" or (self._config.encrypt == "tenants" and request.isolated)
        root = request.chain.root
        return self._engine.encrypt(root) if wanted or self._engine.is_encrypted(root) else None

    def _namespace(self, request: StoreRequest) -> NamespaceInfo:
        namespace = self._engine.namespace(request.chain.root) or request.namespace
        if namespace is None:
            raise NotFoundError("unknown namespace: send its layout with the first store")
        return namespace

    def _check_tokens(self, request: StoreRequest, n_tokens: int) -> None:
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

    def _check_states(self, request: StoreRequest, namespace: NamespaceInfo) -> None:
        if not request.states:
            return
        try:
            check_states(namespace.layout, request.states, request.chain.n_tokens)
        except CorruptDataError as error:
            raise InvalidRequestError(f"states: {error}") from error
        nbytes = sum(state.nbytes for state in request.states)
        if nbytes > self._config.memory_bytes:
            words = f"a checkpoint of {nbytes} bytes is more than memory_bytes = {self._config.memory_bytes}"
            raise LimitError(words, limit="memory_bytes")

    def _plan(
        self, request: StoreRequest, namespace: NamespaceInfo, profile: Profile, floor: int, held: Match
    ) -> Upload:
        n_tokens = request.chain.n_tokens
        keys = tuple(request.chain.block_keys())
        full = sum(1 for piece in held.slices if piece.take == BLOCK_TOKENS)
        first, depends_on = self.uploads.receiving(keys, full, floor)
        spliced = held.slices[full:] if first == full else ()
        start = min(first * BLOCK_TOKENS + sum(piece.take for piece in spliced), n_tokens)
        known = self._engine.checkpoint_at(request.chain)
        sender = self.uploads.sender_of(request.chain.checkpoint_key(), floor) if request.states else None
        held_states = known is not None and known.fidelity >= floor
        return Upload(
            namespace=namespace,
            namespace_record=namespace.to_record(),
            chain=request.chain,
            keys=keys,
            profile=profile,
            profile_named=request.profile not in ("", AUTO),
            restored_fidelity=restored_fidelity(request),
            first_block=first,
            spliced=spliced,
            pieces=tuple(cut_pieces(start, n_tokens, request.restored_tokens)) if start < n_tokens else (),
            states=() if held_states or sender else request.states,
            depends_on=tuple(dict.fromkeys((*depends_on, sender))) if sender and not held_states else depends_on,
            awaits_checkpoint=not held_states and sender is not None,
        )

    def _open(self, upload: Upload, caller: str) -> bool:
        """List the upload and make its staging file; False when there can be no room for it. Evicts nothing yet."""
        nbytes = upload.upload_bytes
        if nbytes > self._staged.limit_bytes or not self._engine.could_reserve(nbytes):
            return False
        words = "bytes of uploads are under way; try again later"
        if not self._shares.try_acquire(caller, nbytes):
            raise LimitError(
                f"{self._shares.share_bytes} {words} (one client's share)", RETRY_S, "staging_share_percent"
            )
        held = contextlib.ExitStack()
        upload.release = held.close
        held.callback(self._shares.release, caller, nbytes)
        try:
            if not self._staged.try_acquire(nbytes):
                raise LimitError(f"{self._staged.limit_bytes} {words}", RETRY_S, "staging_share_percent")
            held.callback(self._staged.release, nbytes)
            booking = Booking(self._engine, nbytes)
            upload.cover = booking.cover
            held.callback(booking.end)
            held.callback(self._engine.lease([piece.row for piece in upload.spliced]).release)
            if upload.wants_bytes:
                upload.staging = StagingFile(
                    self._staging_dir, upload.upload_id, nbytes, encrypted=upload.encrypted, cover=upload.cover
                )
                held.callback(upload.staging.remove)
            self.uploads.add(upload)
        except BaseException:
            held.close()
            raise
        return True

    # -- commit --------------------------------------------------------------------------------------------------

    def commit(self, upload: Upload) -> StoreOutcome:
        """Validate, encode, write, commit; always ends the upload. Uploads that it depends on have ended.

        Raises InvalidRequestError for bytes that are not what was asked for; then nothing of the upload is stored.
        """
        try:
            if upload.staging is not None:
                upload.staging.finish()
                upload.cover(upload.upload_bytes)
            floor = self._floor(upload)
            needed = min(upload.first_block * BLOCK_TOKENS, upload.n_tokens)
            before = self._engine.match(upload.chain, floor, needed)
            new_bytes, reason = 0, Reason.OK
            if self._engine.is_evicted(upload.chain.root, upload.evictions):
                reason = Reason.EVICTED
            elif before.n_tokens < needed:
                reason = Reason.DEPENDENCY_LOST
            elif upload.wants_bytes:
                new_bytes, reason = self._write(upload, before.fidelity)
            after = self._engine.match(upload.chain, floor, upload.n_tokens)
            self._engine.touch(after.parts)
            if after.n_tokens < upload.n_tokens and reason is Reason.OK:
                reason = Reason.DEPENDENCY_LOST
            if upload.awaits_checkpoint and reason is Reason.OK:
                row = self._engine.checkpoint_at(upload.chain)
                if row is None or row.fidelity < floor:
                    reason = Reason.DEPENDENCY_LOST
            self.tokens_stored += max(0, after.n_tokens - upload.start) if upload.pieces else 0
            # Part of it may be what another upload committed a moment ago.
            return StoreOutcome(after.n_tokens, new_bytes, reason, self._engine.await_durable())
        except StoreFullError:
            return StoreOutcome(0, 0, Reason.STORE_FULL, durable=False)
        finally:
            self.uploads.end(upload)

    def _write(self, upload: Upload, fidelity: int) -> tuple[int, Reason]:
        """Hand the blocks to the engine. Codes that can no longer be spliced cost the store, not the worker."""
        try:
            receipt = self._engine.store(
                upload.namespace_record,
                self._new_blocks(upload, fidelity),
                # A block that is spliced may be another sequence's tail: nothing here may make room for what needs it.
                protect=[*upload.keys, *upload.new_keys, *(piece.row.key for piece in upload.spliced)],
                encryption=upload.encryption,
                since=upload.evictions,
            )
        except CorruptDataError:
            evicted = [piece for piece in upload.spliced if not self._engine.show(piece.row.key)]
            for piece in upload.spliced:
                self._engine.recheck(piece.row.key)
            return 0, Reason.EVICTED if evicted else Reason.CORRUPT
        return receipt.new_bytes, receipt.reason

    def _floor(self, upload: Upload) -> int:
        return upload.profile.fidelity if upload.profile_named else FIDELITY_ANY

    def _new_blocks(self, upload: Upload, fidelity: int) -> Iterator[NewBlock]:
        """Encode the upload's blocks one by one, as the engine asks for them; the checkpoint comes last.

        The bytes of a block are good until the next one is asked for.
        """
        root = upload.namespace.root
        parent = upload.chain.parent(upload.first_block)
        threshold = max(self._config.min_quantize_tokens, upload.profile.min_quantize_tokens)
        quantize = upload.n_tokens >= threshold and upload.profile.fidelity < FIDELITY_EXACT
        # What was computed after restored tokens, or stands after spliced ones, is no better than these.
        fidelity = min([fidelity, upload.restored_fidelity, *(piece.row.fidelity for piece in upload.spliced)])
        offset = 0
        blocks = range(upload.first_block, len(upload.keys)) if upload.pieces else ()
        # One for all blocks: fresh memory for each took longer than to read and hash what goes into it.
        memory = np.empty(len(blocks[:1]) * BLOCK_TOKENS * upload.layout.token_bytes, np.uint8).data
        for index in blocks:
            if self._given_up:
                raise UnavailableError("the daemon is stopping")
            start, end = block_range(index, upload.n_tokens)
            runs = self._spliced_runs(upload) if index == upload.first_block else []
            for piece in upload.pieces:
                if start <= piece.start < end:
                    place = memory[(piece.start - start) * upload.layout.token_bytes :]
                    runs.append(self._uploaded_run(upload, piece, offset, place))
                    offset += piece.n_tokens * upload.layout.token_bytes
            encoded = self._encode(upload, runs, quantize, start)
            fidelity = min([fidelity, *(one.run.fidelity for one in encoded)])
            block = Block(
                root=root,
                parent=parent,
                key=upload.keys[index],
                start=start,
                tokens=upload.chain.tokens[start * TOKEN_BYTES : end * TOKEN_BYTES],
                fidelity=fidelity,
                runs=tuple(one.run for one in encoded),
                created_s=int(time.time()),
                namespace=upload.namespace_record,
            )
            yield NewBlock(block, [buffer for one in encoded for buffer in one.buffers])
            parent = block.key
        if upload.states:
            yield self._new_checkpoint(upload, fidelity)

    def _new_checkpoint(self, upload: Upload, fidelity: int) -> NewBlock:
        """The states after the last token, byte for byte; `fidelity` is that of the tokens they were computed from."""
        if upload.staging is None:
            raise InvalidRequestError("nothing was uploaded")
        chain = upload.chain
        block = Block(
            root=chain.root,
            parent=chain.parent(chain.full),
            key=chain.checkpoint_key(),
            start=chain.full * BLOCK_TOKENS,
            tokens=chain.tail,
            fidelity=fidelity,
            runs=(),
            created_s=int(time.time()),
            namespace=upload.namespace_record,
            states=upload.states,
        )
        buffers = []
        offset = upload.pieces_bytes
        for state in upload.states:
            for array in state.arrays:
                data = upload.staging.read(offset, array.nbytes)
                if array.dtype == "BOOL" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
                    raise InvalidRequestError(f"array {array.name} of layer {state.layer} is not of booleans")
                buffers.append(data)
                offset += array.nbytes
        return NewBlock(block, buffers)

    def _spliced_runs(self, upload: Upload) -> list[EncodedRun]:
        """The stored runs that the first block starts with, read back, verified and cut."""
        runs: list[EncodedRun] = []
        for piece in upload.spliced:
            left = piece.take
            with self._engine.reader([piece]) as reader:
                for run in piece.row.block.runs:
                    if left:
                        shown = min(left, run.shown)
                        runs.append(narrow_run(load_run(run, 0, reader), shown))
                        left -= shown
        return runs

    def _uploaded_run(self, upload: Upload, piece: Piece, offset: int, memory: memoryview) -> EncodedRun:
        """A piece of the staging file as a raw run in `memory`, validated."""
        if upload.staging is None:
            raise InvalidRequestError("nothing was uploaded")
        layout, n_tokens = upload.layout, piece.n_tokens
        fidelity = upload.restored_fidelity if piece.restored else FIDELITY_EXACT
        payload = upload.staging.read(offset, n_tokens * layout.token_bytes, memory)
        raw = payload_run(layout, payload, n_tokens, fidelity)
        tensors = [(stack.part, tensor) for stack in raw.run.stacks for tensor in stack.tensors]
        for (part, tensor), buffer in zip(tensors, raw.buffers, strict=True):
            if tensor.name in ("scales", "biases") and not device.all_finite(buffer, tensor.dtype):
                raise InvalidRequestError(f"non-finite {tensor.name} in quantized {part}")
        return raw

    def _encode(self, upload: Upload, runs: Sequence[EncodedRun], quantize: bool, start: int) -> list[EncodedRun]:
        """Join neighbours, quantize what is first-hand when the sequence is long enough, pack what stays raw."""
        layout, profile = upload.layout, upload.profile
        encoded = join_runs(runs)
        if quantize and any(is_first_hand(one.run) for one in encoded):
            encoded = encode_runs(layout, runs, profile, start, self._on_lane)
        return [pack_run(layout, one, profile) for one in encoded]

    def _on_lane(self, work: Callable[[], T]) -> T:
        return self._lane.submit_store(work).result()


def restored_fidelity(request: StoreRequest) -> int:
    """The rank of what the worker restored, and so at best that of all it computed after it."""
    return request.restored_fidelity if request.restored_tokens else FIDELITY_EXACT
