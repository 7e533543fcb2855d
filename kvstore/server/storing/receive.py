"""Turns the bytes of an upload into blocks, one by one, as the engine asks for them.

Memory per upload: one or two blocks of raw KV, which are counted, and their encoded form. KV that came out of the store
is never quantized a second time: restored tokens are spliced from the daemon's own codes, or kept raw at the rank at
which they were served.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import numpy as np

from kvstore.codecs import device
from kvstore.codecs.codec import NO_CONTEXT
from kvstore.codecs.encode import encode_runs, is_first_hand
from kvstore.codecs.runs import EncodedRun, join_runs, load_run, narrow_run, pack_run, payload_run
from kvstore.config import Config
from kvstore.core.blocks import BLOCK_TOKENS, FIDELITY_EXACT, TOKEN_BYTES, Block, Origin
from kvstore.core.byte_budget import ByteBudget
from kvstore.core.layers import Piece
from kvstore.engine import Engine, NewBlock
from kvstore.errors import InvalidRequestError, LimitError
from kvstore.server.lane import Lane
from kvstore.server.storing.uploads import RETRY_S, Shares, Upload

# Blocks of uploads take at most 1/MEMORY_SHARE of memory_bytes, so that stalled workers cannot take all of it.
MEMORY_SHARE = 2
# Their second buffers take at most 1/SECOND_SHARE of memory_bytes besides. They make a store faster, and an upload that
# has one must not keep another from beginning.
SECOND_SHARE = 8
# How often a full budget is checked again.
MEMORY_EVERY_S = 0.02


class Receiver:
    """Makes the blocks of uploads. Waits for the worker and for the lane, so call it on the upload's own thread."""

    def __init__(self, engine: Engine, lane: Lane, config: Config, buffers: ByteBudget) -> None:
        """`buffers`: the daemon's memory_bytes."""
        self._engine = engine
        self._lane = lane
        self._config = config
        self.buffers = buffers
        self._blocks = Shares(lambda: buffers.limit_bytes, MEMORY_SHARE)
        self._seconds = Shares(lambda: buffers.limit_bytes, SECOND_SHARE)

    @staticmethod
    def buffer_bytes(upload: Upload) -> int:
        """Size of a buffer that holds any block of the upload, or its checkpoint."""
        states = sum(state.nbytes for state in upload.states)
        return max(states, min(BLOCK_TOKENS, upload.n_tokens - upload.start) * upload.layout.token_bytes)

    @contextlib.contextmanager
    def memory(self, upload: Upload) -> Iterator[list[memoryview]]:
        """The upload's counted buffers, used for its blocks in turn. Raises LimitError while memory_bytes are in use.

        Two where there is room, so that a block is received while the one before it is written. Not one for each
        block: allocating took longer than reading and hashing the block.
        """
        nbytes, give_up_at = self.buffer_bytes(upload), time.monotonic() + self._config.limits.upload_idle_s
        while not self._take_memory(self._blocks, nbytes):
            if upload.intake.error is not None:
                raise upload.intake.error
            if time.monotonic() >= give_up_at:
                words = f"memory_bytes = {self.buffers.limit_bytes} of buffers are in use; try again later"
                raise LimitError(words, RETRY_S, "memory_bytes")
            time.sleep(MEMORY_EVERY_S)
        shares = [self._blocks]
        if upload.upload_bytes > nbytes and self._take_memory(self._seconds, nbytes):
            shares.append(self._seconds)
        try:
            yield [np.empty(nbytes, np.uint8).data for _ in shares]
        finally:
            for share in shares:
                self.buffers.release(nbytes)
                share.release("", nbytes)

    def _take_memory(self, share: Shares, nbytes: int) -> bool:
        if share.try_acquire("", nbytes) is not None:
            return False
        if self.buffers.try_acquire(nbytes):
            return True
        share.release("", nbytes)
        return False

    def blocks(self, upload: Upload, fidelity: int, memory: Sequence[memoryview]) -> Iterator[NewBlock]:
        """Receive and encode the upload's blocks one by one, as the engine asks for them; the checkpoint comes last.

        The bytes of a block are in one buffer of `memory`, and valid until the block is requested that is next in it.
        """
        root = upload.namespace.root
        parent = upload.chain.parent(upload.first_block)
        profile = upload.choice.profile
        threshold = max(self._config.min_quantize_tokens, profile.min_quantize_tokens)
        quantize = upload.n_tokens >= threshold and profile.fidelity < FIDELITY_EXACT
        # Tokens that follow restored or spliced ones are at most as exact as those.
        fidelity = min([fidelity, upload.restored_fidelity, *(piece.row.fidelity for piece in upload.spliced)])
        for index in range(upload.first_block, len(upload.keys)) if upload.pieces else ():
            if upload.intake.error is not None:  # given up, and it may be that no byte of it is missing
                raise upload.intake.error
            start = index * BLOCK_TOKENS
            end = min(start + BLOCK_TOKENS, upload.n_tokens)
            runs = self._spliced_runs(upload) if upload.spliced and index == upload.first_block else []
            free = memory[index % len(memory)]
            for piece in upload.pieces:
                if start <= piece.start < end:
                    nbytes = piece.n_tokens * upload.layout.token_bytes
                    runs.append(self._uploaded_run(upload, piece, free[:nbytes]))
                    free = free[nbytes:]
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
                origin=self._origin(upload, start, end),
            )
            buffers = [buffer for one in encoded for buffer in one.buffers]
            yield NewBlock(block, buffers)
            parent = block.key
        if upload.states:
            yield self._new_checkpoint(upload, fidelity, memory[len(upload.keys) % len(memory)])
        upload.intake.finish(self._config.limits.upload_idle_s)

    def _origin(self, upload: Upload, start: int, end: int) -> Origin | None:
        """Whether `auto` chose how all of a block is encoded, and whether it is not to be re-encoded.

        Tokens that came out of the store are not: they may be re-encoded ones.
        """
        restored = any(piece.restored and start <= piece.start < end for piece in upload.pieces)
        auto, settled = upload.choice.auto, upload.choice.smallest or restored
        if spliced := [piece.row.key for piece in upload.spliced if piece.row.start == start]:
            was_auto, was_settled = self._engine.reencoder.origin(spliced)
            auto, settled = auto and was_auto, settled or was_settled
        return Origin(auto, settled) if auto or settled else None

    def _new_checkpoint(self, upload: Upload, fidelity: int, memory: memoryview) -> NewBlock:
        """The states after the last token, byte for byte; `fidelity` is that of the tokens they were computed from."""
        chain = upload.chain
        block = Block(
            root=chain.root,
            parent=chain.parent(chain.full),
            key=chain.checkpoint_key(),
            start=chain.full * BLOCK_TOKENS,
            tokens=chain.tail,
            fidelity=fidelity,
            runs=(),
            states=upload.states,
        )
        buffers = []
        for state in upload.states:
            for array in state.arrays:
                data, memory = memory[: array.nbytes], memory[array.nbytes :]
                upload.intake.fill(data, self._config.limits.upload_idle_s)
                if array.dtype == "BOOL" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
                    raise InvalidRequestError(f"array {array.name} of layer {state.layer} is not of booleans")
                buffers.append(data)
        return NewBlock(block, buffers, upload.interim)

    def _spliced_runs(self, upload: Upload) -> list[EncodedRun]:
        """The stored runs that the first block starts with, read back, verified and cut."""
        runs: list[EncodedRun] = []
        for piece in upload.spliced:
            left = piece.take
            with contextlib.closing(self._engine.reader([piece])) as reader:
                for run in piece.row.block.runs:
                    if left:
                        shown = min(left, run.shown)
                        runs.append(narrow_run(load_run(run, 0, reader), shown))
                        left -= shown
        return runs

    def _uploaded_run(self, upload: Upload, piece: Piece, payload: memoryview) -> EncodedRun:
        """The next piece, received into `payload`, as a raw run, validated."""
        layout, n_tokens = upload.layout, piece.n_tokens
        fidelity = upload.restored_fidelity if piece.restored else FIDELITY_EXACT
        upload.intake.fill(payload, self._config.limits.upload_idle_s)
        raw = payload_run(layout, payload, n_tokens, fidelity)
        tensors = [(stack.part, tensor) for stack in raw.run.stacks for tensor in stack.tensors]
        for (part, tensor), buffer in zip(tensors, raw.buffers, strict=True):
            if tensor.name in ("scales", "biases") and not device.all_finite(buffer, tensor.dtype):
                raise InvalidRequestError(f"non-finite {tensor.name} in quantized {part}")
        return raw

    def _encode(self, upload: Upload, runs: Sequence[EncodedRun], quantize: bool, start: int) -> list[EncodedRun]:
        """Join adjacent runs, quantize first-hand ones if the sequence is long enough, and pack what stays raw.

        AuxMissingError when the basis of the profile is gone.
        """
        layout, profile = upload.layout, upload.choice.profile
        if quantize and any(is_first_hand(one.run) for one in runs):
            references = profile.references
            aux = self._engine.aux(upload.chain.root, references) if references else NO_CONTEXT.aux
            encoded = encode_runs(layout, runs, profile, start, self._lane.run_store, aux)
        else:
            encoded = join_runs(runs)
        return [pack_run(layout, one, profile) for one in encoded]
