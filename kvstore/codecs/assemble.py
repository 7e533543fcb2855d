"""The fetch side of kv layers: runs of many blocks -> one array for each tensor of a layer, with head-room.

    byte_plan.py plan: from the runs alone, which ranges are needed and where their rows go
    gather.py    read: the ranges, verified, into place
    here         a layer's tensors as one virtual file, then decoding and concatenating segments

A layer's tensors are arrays that MLX allocates and kvstore fills (`virtual.py`): the bytes go from the blocks straight
into MLX's buffers, on a thread or more. mx.load of every block and concatenating takes 4.3-5.3x mx.load of
one file, preadv into numpy and mx.array 2.3-2.9x. Rejected: asking Linux for pages of 2 MiB, faster than mx.load at
times and, on a virtual machine whose host takes free memory back, several times as slow. Only decoding may be lazy:
when `assemble_layer` returns, every byte was read and verified.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from kvstore.blobs.protocol import RangeReader
from kvstore.blobs.ranges import Range
from kvstore.codecs import device
from kvstore.codecs.affine import AFFINE, is_folded
from kvstore.codecs.byte_plan import HitBlock, Segment, plan_segments
from kvstore.codecs.codec import NO_CONTEXT, BlockCorruptError, Context, codec_of
from kvstore.codecs.gather import Filler
from kvstore.codecs.virtual import Reads, VirtualFile
from kvstore.core.blocks import BLOCK_TOKENS, FIDELITY_EXACT, Recipe, Run
from kvstore.core.layers import PARTS, KVLayer, LayerSpec, Layout, PartSpec
from kvstore.errors import InvalidRequestError


def assemble_layer(
    layout: Layout,
    layer: int,
    blocks: Sequence[HitBlock],
    reader: RangeReader,
    headroom_tokens: int = BLOCK_TOKENS,
    verify: bool = True,
    keep_codes: bool = False,
    reads: Reads | None = None,
    context: Context = NO_CONTEXT,
) -> KVLayer:
    """`begin_layer` and `finish`."""
    begun = begin_layer(layout, layer, blocks, reader, headroom_tokens, verify, keep_codes, reads, context)
    return begun.finish()


def begin_layer(
    layout: Layout,
    layer: int,
    blocks: Sequence[HitBlock],
    reader: RangeReader,
    headroom_tokens: int = BLOCK_TOKENS,
    verify: bool = True,
    keep_codes: bool = False,
    reads: Reads | None = None,
    context: Context = NO_CONTEXT,
    order: Sequence[Range] = (),
) -> VirtualFile[KVLayer]:
    """Begin to read one kv layer of a hit, into buffers of its tokens and head-room, rounded up to 256 rows.

    Unused rows are zero. `keep_codes`: where all of the layer is affine of one kind it comes as an engine keeps a
    quantized cache, as codes, scales and biases, under a spec that says so. `context`: the position of the first token,
    and files that recipes refer to. `order`: the layer's ranges as they come, for a reader that gives them only in that
    order; then `finish` reads them on this thread. Everything is read when `finish` returns; decoding may still be
    lazy, so evaluate on this thread. Both raise BlockCorruptError (a CorruptDataError with `.source`) for damaged,
    missing or misdescribed data, UnknownFormatError for a recipe that this build cannot read, AuxMissingError for a
    file that `context` lacks, OSError if the disk fails, and what `reads` raises.
    """
    spec = layout.layers[layer]
    assert not spec.is_exact, "window and state layers come from a checkpoint: see states.py"
    n_tokens = sum(block.take for block in blocks)
    capacity = -(-(n_tokens + headroom_tokens) // BLOCK_TOKENS) * BLOCK_TOKENS
    plan = {part: plan_segments(part, spec.part(part), layer, blocks) for part in PARTS if spec.part(part).width}

    def build(arrays: dict[str, mx.array]) -> KVLayer:
        loaded = _by_segment(plan, arrays)
        if keep_codes and (quantized := _quantized_spec(spec, plan)):
            keys, values = (tuple(loaded[part][0]) for part in PARTS)
            return KVLayer(quantized, keys, values, n_tokens)
        parts = {}
        for part, segments in plan.items():
            place = replace(context, part=part, layers=(layer,))
            parts[part] = _decoded(spec.part(part), segments, loaded[part], capacity, place)
        return KVLayer(spec, parts.get("keys", ()), parts.get("values", ()), n_tokens)

    return _file(plan, capacity - n_tokens, Filler(reader, verify), reads, order).begin(build)


def _quantized_spec(spec: LayerSpec, plan: dict[str, list[Segment]]) -> LayerSpec | None:
    """The layer as mlx-lm's quantized cache has it; None where keys and values are not such codes, and alike."""
    recipes = {segment.recipe for segments in plan.values() for segment in segments}
    recipe = next(iter(recipes))
    once = len(plan) == len(PARTS) and all(len(segments) == 1 for segments in plan.values())
    if len(recipes) != 1 or not once or recipe.name != AFFINE or is_folded(recipe):
        return None
    bits, group = recipe.param("bits"), recipe.param("group")
    return replace(
        spec, keys=replace(spec.keys, bits=bits, group=group), values=replace(spec.values, bits=bits, group=group)
    )


def packed_layer(
    layout: Layout, layer: int, blocks: Sequence[HitBlock], reader: RangeReader
) -> dict[str, list[tuple[Recipe, list[mx.array]]]]:
    """The tensors of one kv layer of a hit as they are stored, by part: (recipe, tensors `[1, heads, rows, width]`).

    Neighbouring runs of one recipe are put together. InvalidRequestError for recipes that only go together in groups of
    tokens; else as `assemble_layer`, without head-room.
    """
    spec = layout.layers[layer]
    plan = {part: plan_segments(part, spec.part(part), layer, blocks) for part in PARTS if spec.part(part).width}
    if any(segment.group_tokens > 1 for segments in plan.values() for segment in segments):
        raise InvalidRequestError(f"layer {layer} is stored in groups of tokens, which cannot be cut without decoding")
    loaded = _by_segment(plan, _file(plan, 0, Filler(reader)).begin(dict).finish())
    return {
        part: [(segment.recipe, tensors) for segment, tensors in zip(segments, loaded[part], strict=True)]
        for part, segments in plan.items()
    }


def _file(
    plan: dict[str, list[Segment]],
    spare_tokens: int,
    filler: Filler,
    reads: Reads | None = None,
    order: Sequence[Range] = (),
) -> VirtualFile[Any]:
    """The tensors of every segment of every part, with `spare_tokens` rows of zeros behind the last."""
    file = VirtualFile[Any](reads, _names_of_ranges(plan, order) if order else ())
    for part, segments in plan.items():
        for number, segment in enumerate(segments):
            spare = spare_tokens if number == len(segments) - 1 and segment.group_tokens == 1 else 0
            for index, tensor in enumerate(segment.tensors):
                rows = tensor.rows(segment.held + spare)
                shape = (1, tensor.heads, rows, tensor.width)
                fill = functools.partial(filler.fill, segment, index, rows)
                file.add(f"{part}.{number}.{index}", tensor.dtype, shape, fill)
    return file


def _names_of_ranges(plan: dict[str, list[Segment]], ranges: Sequence[Range]) -> list[str]:
    """The tensor of `_file` that has the rows of each range. BlockCorruptError for a range that has no rows of any."""
    names = {
        (span.source, stored.layer_range(span.position, span.n_tokens)[0]): f"{part}.{number}.{index}"
        for part, segments in plan.items()
        for number, segment in enumerate(segments)
        for span in segment.spans
        for index, stored in enumerate(span.stack.tensors)
        if stored.layer_bytes(span.n_tokens)
    }
    for one in ranges:
        if (one.source, one.offset) not in names:
            raise BlockCorruptError(
                f"block {one.source} has bytes at {one.offset} that are not of the layer", one.source
            )
    return [names[one.source, one.offset] for one in ranges]


def _by_segment(plan: dict[str, list[Segment]], arrays: dict[str, mx.array]) -> dict[str, list[list[mx.array]]]:
    """The arrays of `_file`, by part and segment."""
    return {
        part: [
            [arrays[f"{part}.{number}.{index}"] for index in range(len(segment.tensors))]
            for number, segment in enumerate(segments)
        ]
        for part, segments in plan.items()
    }


def _decoded(
    part: PartSpec, segments: Sequence[Segment], loaded: Sequence[list[mx.array]], capacity: int, context: Context
) -> tuple[mx.array, ...]:
    """Decode and concatenate the arrays of a part. Arrays that the engine keeps quantized are returned unchanged."""
    if part.bits:
        return tuple(loaded[0])
    decoded = [_decode(segment, tensors, part, context) for segment, tensors in zip(segments, loaded, strict=True)]
    missing = capacity - sum(array.shape[2] for array in decoded)
    if missing:
        decoded.append(device.zeros((1, part.heads, missing, part.width), part.dtype))
    return (decoded[0] if len(decoded) == 1 else mx.concatenate(decoded, axis=2),)


def _decode(segment: Segment, tensors: Sequence[mx.array], part: PartSpec, context: Context) -> mx.array:
    """Rows of a segment and of the head-room after it; other rows of its groups are cut off."""
    spare = tensors[0].shape[2] - segment.held if segment.group_tokens == 1 else 0
    first = context.first_token + segment.start - segment.lead
    placed = replace(context, first_token=first, spare_tokens=spare)
    array = codec_of(segment.recipe).decode(tensors, segment.recipe, part, placed)
    if segment.lead + segment.shown == segment.held and not segment.lead:
        return array
    return mx.contiguous(array[:, :, segment.lead : segment.lead + segment.shown])


def dense_runs(layout: Layout, rows_of_runs: Sequence[int], fidelity: int = FIDELITY_EXACT) -> tuple[Run, ...]:
    """Describes a dense answer as raw runs of one block, with these token counts; without checksums."""
    offset = 0
    runs = []
    for rows in rows_of_runs:
        stacks = []
        for stack in layout.raw_stacks:
            tensors = []
            for tensor in stack.tensors:
                tensors.append(replace(tensor, offset=offset))
                offset += len(stack.layers) * tensor.layer_bytes(rows)
            stacks.append(replace(stack, tensors=tuple(tensors)))
        runs.append(Run(rows, 0, rows, fidelity, tuple(stacks)))
    return tuple(runs)


def dense_bytes(layer: KVLayer) -> list[memoryview]:
    """A layer cut to its tokens, as bytes in the order of `layer_ranges` over `dense_runs`. Evaluates."""
    arrays = [mx.contiguous(array[:, :, : layer.n_tokens, :]) for part in PARTS for array in layer.part(part)]
    device.evaluate(arrays)
    return [device.to_bytes(array).data.cast("B") for array in arrays]
