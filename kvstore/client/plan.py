"""The daemon's fetch plan, parsed and validated against the request before any data is read."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvstore.blobs.ranges import FileSource, Range
from kvstore.codecs.byte_plan import HitBlock
from kvstore.core.blocks import BLOCK_TOKENS, ITEM_BYTES, LayerState, Reason
from kvstore.core.keys import Chain, Namespace
from kvstore.core.layers import LayerSpec
from kvstore.core.records import runs_from_record, templates_by_id
from kvstore.errors import CorruptDataError, LayoutMismatchError
from kvstore.wire.convert import states_from_bytes
from kvstore.wire.v1 import kvstore_pb2 as pb

# The windows of the largest models of today come to about 1.2 GiB.
STATE_BYTES_MAX = 4 << 30


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a fetch: blocks in order, their keys, and their files for path transport. 0 tokens is a miss.

    `states` is the checkpoint at `n_tokens` where the layout needs one. It is one more source after the blocks, so
    `keys` and `files` have one more entry, and then the plan cannot be cut: the states are good at its end only.
    """

    n_tokens: int
    reason: Reason
    fidelity: int
    blocks: tuple[HitBlock, ...] = ()
    keys: tuple[bytes, ...] = ()
    files: tuple[FileSource, ...] = ()
    states: tuple[LayerState, ...] = ()
    fetch_id: str = ""

    @property
    def references(self) -> frozenset[bytes]:
        """Digests of what the recipes of its runs refer to."""
        stacks = (stack for block in self.blocks for run in block.runs for stack in run.stacks)
        return frozenset(digest for stack in stacks for digest in stack.recipe.references)

    @property
    def state_source(self) -> int:
        """The number under which the checkpoint's bytes are read."""
        return len(self.blocks)

    def state(self, layer: int) -> LayerState:
        """A window or state layer's part of the checkpoint."""
        return next(state for state in self.states if state.layer == layer)

    @property
    def nbytes(self) -> int:
        """Payload bytes that are read for it."""
        total = sum(state.nbytes for state in self.states)
        for block in self.blocks:
            left = block.take
            for run in block.runs:
                if left > 0:
                    total += run.nbytes()
                    left -= run.shown
        return total

    def tokens_without(self, source: int) -> int:
        """The longest prefix that needs no bytes of this source; all but one token if the source is the checkpoint."""
        if source == self.state_source:
            return self.n_tokens - 1
        return sum(block.take for block in self.blocks[:source])

    def first(self, count: int, reason: Reason) -> Plan:
        """The plan cut down to its first `count` blocks, for `reason`; not for a plan with states."""
        blocks = self.blocks[:count]
        n_tokens = sum(block.take for block in blocks)
        return replace(
            self, n_tokens=n_tokens, reason=reason, blocks=blocks, keys=self.keys[:count], files=self.files[:count]
        )


@dataclass(frozen=True, slots=True)
class Request:
    """A fetch request: namespace, prompt, minimum fidelity, and whether the daemon decodes."""

    namespace: Namespace
    chain: Chain
    fidelity_min: int
    dense: bool


def parse_plan(message: pb.FetchPlan, request: Request) -> Plan:
    """The plan, if it can be an answer to the request.

    Raises LayoutMismatchError for another layout, CorruptDataError for a plan that contradicts itself or the request.
    """
    reason = Reason.of(message.reason, Reason.INTERNAL)
    if not message.n_tokens:
        return Plan(0, reason, 0)
    if message.layout != request.namespace.layout.record:
        raise LayoutMismatchError("the daemon's layout of this namespace is not the session's")
    templates = templates_by_id(list(message.templates))
    blocks = tuple(HitBlock(runs_from_record(one.runs, templates), one.n_tokens) for one in message.blocks)
    sources: list[pb.BlockSlice | pb.StateSlice] = list(message.blocks)
    if message.HasField("checkpoint"):
        sources.append(message.checkpoint)
    plan = Plan(
        n_tokens=message.n_tokens,
        reason=reason,
        fidelity=message.fidelity,
        blocks=blocks,
        keys=tuple(one.key for one in sources),
        files=tuple(FileSource(one.path, one.payload_offset, one.file_bytes) for one in sources if one.path),
        states=states_from_bytes(message.checkpoint.states) if message.HasField("checkpoint") else (),
        fetch_id=message.fetch_id,
    )
    _check(plan, request)
    _check_checkpoint(plan, request)
    return plan


def _check(plan: Plan, request: Request) -> None:
    if plan.n_tokens >= request.chain.n_tokens:
        raise CorruptDataError(f"a plan of {plan.n_tokens} tokens leaves nothing of the prompt to feed")
    if plan.fidelity < request.fidelity_min:
        raise CorruptDataError("a plan below the fidelity that was asked for")
    if sum(block.take for block in plan.blocks) != plan.n_tokens:
        raise CorruptDataError("the blocks of a plan do not add up to its tokens")
    rows_max = plan.n_tokens if request.dense else BLOCK_TOKENS
    for block in plan.blocks:
        shown = sum(run.shown for run in block.runs)
        if not 0 < block.take <= shown <= rows_max or any(run.n_tokens > 2 * rows_max for run in block.runs):
            raise CorruptDataError("a block of a plan does not hold the tokens that it gives")
    if request.dense:
        if len(plan.blocks) != 1:
            raise CorruptDataError("a dense answer is one block")
        return
    if plan.files and (len(plan.files) != len(plan.keys) or not all(os.path.isabs(one.path) for one in plan.files)):
        raise CorruptDataError("a plan does not name the file of every block")
    _check_keys(plan, request)


def _check_keys(plan: Plan, request: Request) -> None:
    """Full blocks must carry the keys of our own tokens: the last line of defence against another prompt's KV."""
    own = request.chain.keys()
    last = len(plan.blocks) - 1
    for index, (block, key) in enumerate(zip(plan.blocks, plan.keys[: last + 1], strict=True)):
        if block.take == BLOCK_TOKENS:
            if index >= len(own) or key != own[index]:
                raise CorruptDataError(f"block {index} of a plan is not of this prompt")
        elif index != last:
            raise CorruptDataError("a plan has a partial block before its last")


def _check_checkpoint(plan: Plan, request: Request) -> None:
    """The states must be those of our own tokens' end: they have no token axis, so nothing else would ever tell."""
    if bool(plan.states) != bool(request.namespace.layout.exact_layers):
        raise CorruptDataError("a plan does not have the window and state layers of the layout")
    if not plan.states:
        return
    _check_ranges(plan.states)
    if plan.keys[plan.state_source] != request.chain.head(plan.n_tokens).checkpoint_key():
        raise CorruptDataError("the checkpoint of a plan is not of this prompt")


def _check_ranges(states: Sequence[LayerState]) -> None:
    """Check a checkpoint: not too large, arrays one after the other, each with checksums."""
    arrays = [array for state in states for array in state.arrays]
    if sum(array.nbytes for array in arrays) > STATE_BYTES_MAX:
        raise CorruptDataError("the checkpoint of a plan is too large")
    stored = [array for array in arrays if array.nbytes]
    ends = itertools.accumulate((array.nbytes for array in stored), initial=0)
    if any(array.offset != end or not array.checksum for array, end in zip(stored, ends, strict=False)):
        raise CorruptDataError("the arrays of a checkpoint leave gaps or carry no checksums")


# What a lossless frame has beside its content: more than the numbers themselves where these are few and narrow.
FRAME_BYTES_MAX = 64


def layer_bytes(blocks: Sequence[HitBlock], ranges: Sequence[Range], spec: LayerSpec) -> int:
    """Bytes of one layer's ranges; CorruptDataError when they are out of all proportion to what they should decode to.

    The size of a receive buffer: a number from outside must not decide how much memory is taken.
    """
    nbytes = sum(one.nbytes for one in ranges)
    rows = sum(run.n_tokens for block in blocks for run in block.runs)
    # Nothing is stored in more than 4 bytes a number; scales, biases and padding of odd groups get as much again.
    widest = (spec.keys.heads * spec.keys.width + spec.values.heads * spec.values.width) * ITEM_BYTES["F32"]
    if nbytes > 2 * rows * widest + FRAME_BYTES_MAX * len(ranges):
        raise CorruptDataError(f"a plan of {nbytes} bytes for {rows} rows of one layer")
    return nbytes
