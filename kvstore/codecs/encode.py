"""Encodes blocks for storing: decides which tokens and layers of a block a profile encodes, and in which order.

A block arrives as runs: spliced runs, which were read back from the store, then runs that a worker computed. Only raw
values that did not come from the store are encoded:

1. neighbours that are still raw become one run; of the sequence's first, the sinks are set apart
2. stacks whose codec is exact at any token are encoded; then a remainder of an earlier store, whose keys waited for
   the rest of their group beside values that were encoded, looks like what follows it, and they become one run
3. each run is cut after its last whole group, and the stacks of group codecs before that are encoded
4. the rest waits, raw: `runs.pack_run` makes it lossless, and the next store takes it up at 2

A run that follows sinks hides as many rows at its beginning, copies of the first that it shows: so groups begin where
the block does, and no group is stretched by the sinks' outliers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import lcm

import numpy as np

from kvstore.codecs import device
from kvstore.codecs.codec import NO_CONTEXT, Context, codec_of, tensors_of
from kvstore.codecs.device import Bytes
from kvstore.codecs.profiles import Profile, targets
from kvstore.codecs.runs import EncodedRun, cut_run, group_tokens, join_runs, stacks_of
from kvstore.core.blocks import FIDELITY_EXACT, RAW, Recipe, Run, Stack
from kvstore.core.layers import Layout, PartSpec

# Raw bytes that are on the device at once: some 40 ms of work where there is no GPU (0.2 GB/s), and what bounds memory.
PIECE_BYTES = 8 << 20

Submit = Callable[[Callable[[], list[Bytes] | None]], list[Bytes] | None]


def at_once(work: Callable[[], list[Bytes] | None]) -> list[Bytes] | None:
    """Run a piece of device work here: for callers on the MLX thread."""
    return work()


def encode_runs(
    layout: Layout,
    runs: Sequence[EncodedRun],
    profile: Profile,
    start: int,
    submit: Submit = at_once,
    aux: Mapping[bytes, bytes] = NO_CONTEXT.aux,
) -> list[EncodedRun]:
    """The runs of a block whose first token has position `start`, in as few, encoded as far as they can be.

    `submit` runs a piece of device work on the MLX thread and returns what it does; everything else is done here.
    `aux`: the files that the profile's recipes refer to, by digest; AuxMissingError when one is not there. Nothing is
    packed.
    """
    joined = join_runs(runs)
    sinks, others = _split_sinks(joined, profile.sinks) if start == 0 and profile.sinks else ([], joined)
    shown = start + sum(run.run.shown for run in sinks)
    exact = [
        encode_run(layout, run, profile, submit, Context(first, aux=aux), 1) if is_first_hand(run.run) else run
        for run, first in _placed(others, shown)
    ]
    grouped = [
        piece
        for run, first in _placed(join_runs(exact), shown)
        for piece in _encode_groups(layout, run, profile, submit, Context(first, aux=aux))
    ]
    return join_runs([*sinks, *grouped])


def _placed(runs: Sequence[EncodedRun], start: int) -> Iterator[tuple[EncodedRun, int]]:
    """Each run and the position of its first row, a hidden one too, where the first of them shows position `start`."""
    for run in runs:
        yield run, start - run.run.skip
        start += run.run.shown


def is_first_hand(run: Run) -> bool:
    """Whether what is raw in the run are values as the model computed them, which may be encoded.

    A run that came from restored tokens ranks lower, and so none of its stacks is ever encoded: where one is, the raw
    ones beside it are first-hand, whatever the rank of that one.
    """
    raw = [stack.recipe == RAW for stack in run.stacks]
    return any(raw) and (run.fidelity == FIDELITY_EXACT or not all(raw))


def encode_run(
    layout: Layout,
    raw: EncodedRun,
    profile: Profile,
    submit: Submit = at_once,
    context: Context = NO_CONTEXT,
    group: int | None = None,
) -> EncodedRun:
    """The run with its raw stacks encoded as the profile says, split by what becomes of their layers.

    A stack with a value that is not finite, or whose codes would overflow its dtype, stays raw, bit for bit; so does
    what is encoded already. Values in rows that the run hides are encoded with the rest. `context`: the position of the
    run's first row, and files. `group`: only codecs whose groups divide it, at 1 those that are exact at any token;
    None: those whose groups divide the run.
    """
    group = raw.run.n_tokens if group is None else group
    stacks: list[Stack] = []
    buffers: list[Bytes] = []
    fidelity = raw.run.fidelity
    for stack, mine in stacks_of(raw):
        for recipe, positions in _by_target(layout, profile, stack).items():
            one, rows = stack, mine
            if len(positions) < len(stack.layers):
                one = replace(stack, layers=tuple(stack.layers[position] for position in positions))
                rows = [buffer[positions] for buffer in mine]
            part = layout.layers[one.layers[0]].part(stack.part)
            where = replace(context, part=stack.part, layers=one.layers)
            is_wanted = recipe != RAW and group % codec_of(recipe).group_tokens == 0
            encoded = _encode_stack(rows[0], part, recipe, submit, where) if is_wanted else None
            if encoded is not None:
                one = replace(one, recipe=recipe, tensors=tensors_of(part, recipe))
                fidelity = min(fidelity, codec_of(recipe).fidelity(recipe))
            stacks.append(one)
            buffers += encoded or rows
    return EncodedRun(replace(raw.run, fidelity=fidelity, stacks=tuple(stacks)), tuple(buffers))


def _split_sinks(runs: list[EncodedRun], sinks: int) -> tuple[list[EncodedRun], list[EncodedRun]]:
    """The first tokens of a sequence as a run of their own, and the others; see the module."""
    first, others = runs[0], runs[1:]
    untouched = not first.run.skip and all(stack.recipe == RAW for stack in first.run.stacks)
    if not untouched or not is_first_hand(first.run):
        return [], runs
    if first.run.n_tokens <= sinks:
        return [first], others
    sink_run, _ = cut_run(first, sinks)
    buffers = []
    for buffer in first.buffers:
        hidden = buffer.copy()
        hidden[:, :, :sinks] = hidden[:, :, sinks : sinks + 1]
        buffers.append(hidden)
    run = replace(first.run, skip=sinks, shown=first.run.shown - sinks)
    return [sink_run], [EncodedRun(run, tuple(buffers)), *others]


def _encode_groups(
    layout: Layout, run: EncodedRun, profile: Profile, submit: Submit, context: Context
) -> list[EncodedRun]:
    """The run cut after its last whole group, with the groups encoded."""
    if not is_first_hand(run.run):
        return [run]
    recipes = {recipe for stack in run.run.stacks for recipe in _by_target(layout, profile, stack)}
    group = lcm(group_tokens(run.run), *(codec_of(recipe).group_tokens for recipe in recipes))
    whole = run.run.n_tokens // group * group
    if group == 1 or whole <= run.run.skip:
        return [run]
    first, rest = cut_run(run, whole) if whole < run.run.n_tokens else (run, None)
    encoded = encode_run(layout, first, profile, submit, context)
    return [encoded] if rest is None else [encoded, rest]


def _by_target(layout: Layout, profile: Profile, stack: Stack) -> dict[Recipe, list[int]]:
    """Positions in the stack by what is to become of their layers; one entry, RAW, for what is encoded already."""
    if stack.recipe != RAW:
        return {RAW: [*range(len(stack.layers))]}
    of, found = targets(layout, profile), dict[Recipe, list[int]]()
    for position, layer in enumerate(stack.layers):
        found.setdefault(of[stack.part, layer].encoded, []).append(position)
    return found


def _encode_stack(rows: Bytes, part: PartSpec, recipe: Recipe, submit: Submit, context: Context) -> list[Bytes] | None:
    """The tensors of `rows` [L, H, T, row_bytes], a few layers at a time; None when they must stay raw."""
    if not device.all_finite(rows, part.dtype):
        return None
    n_layers, _, n_tokens, _ = rows.shape
    shapes = [(n_layers, t.heads, t.rows(n_tokens), t.row_bytes) for t in tensors_of(part, recipe)]
    out = [np.empty(shape, np.uint8) for shape in shapes]
    step = max(1, PIECE_BYTES * n_layers // max(1, rows.nbytes))
    for at in range(0, n_layers, step):
        some = replace(context, layers=context.layers[at : at + step])
        tensors = submit(functools.partial(_encode_piece, rows[at : at + step], part, recipe, some))
        if tensors is None:
            return None
        for buffer, tensor in zip(out, tensors, strict=True):
            buffer[at : at + step] = tensor
    return out


def _encode_piece(rows: Bytes, part: PartSpec, recipe: Recipe, context: Context) -> list[Bytes] | None:
    """The tensors of a few layers, None when their codes cannot be trusted. MLX thread only."""
    codec = codec_of(recipe)
    tensors = codec.encode(device.to_array(rows, part.dtype), recipe, context)
    trusted = codec.trusted(tensors, recipe, context)
    device.evaluate([*tensors, trusted])
    return [device.to_bytes(tensor) for tensor in tensors] if trusted.item() else None
