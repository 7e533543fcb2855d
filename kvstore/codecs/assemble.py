"""The fetch side of kv layers: runs of many blocks -> one array for each tensor of a layer, with head-room.

A layer is read by one `mx.load` of a virtual file (`virtual.py`), which gathers the bytes from the blocks straight into
MLX's buffer, on two threads. Against mx.load of one file of equal capacity, into fresh memory, that costs 1.1-1.3x
(1 GiB) or 1.3-1.7x (256 MiB); mx.load of every block and concatenating 4.3-5.3x, preadv into numpy and mx.array
2.3-2.9x. Rejected: asking Linux for pages of 2 MiB, faster than mx.load at times and, on a virtual machine whose host
takes free memory back, several times as slow. Only decoding may be lazy: when `assemble_layer` returns, every byte was
read and verified.

Plan first: `_segments` says from the runs alone which ranges are needed and where their rows go. Neighbouring runs of
one recipe share a segment: one tensor of the virtual file each, and one decode; what a byte codec packed is unpacked on
the way and shares the segments of raw rows. A group codec's rows are whole groups: a hit that begins or ends inside one
cuts after decoding, so its segment begins or ends there too. Segments are then concatenated.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import mlx.core as mx

from kvstore.blocks import BLOCK_TOKENS, FIDELITY_EXACT, ITEM_BYTES, RAW, Recipe, Run, Stack, Tensor
from kvstore.codecs import device
from kvstore.codecs.affine import AFFINE, is_folded
from kvstore.codecs.base import BlockCorruptError, ByteCodec, codec_of, packer_of, verify_range
from kvstore.codecs.virtual import VirtualFile
from kvstore.errors import CorruptDataError, InvalidRequestError
from kvstore.files import Range, RangeReader
from kvstore.layers import PARTS, KVLayer, LayerSpec, Layout, PartSpec

__all__ = [
    "BlockCorruptError",
    "HitBlock",
    "Range",
    "assemble_layer",
    "dense_bytes",
    "dense_runs",
    "layer_ranges",
    "packed_layer",
]

# Tensors of this size and more are read on two threads: 0.7x the time at 4 MiB on two cores, files in the page cache.
# Starting a thread for each read instead of keeping some ate that gain. They do not survive a fork; nor does MLX.
HELPED_BYTES = 1 << 20
_HELPERS = ThreadPoolExecutor(2, "kvstore-read")


@dataclass(frozen=True, slots=True)
class HitBlock:
    """A block of a hit: its runs, and how many tokens are used from its first."""

    runs: tuple[Run, ...]
    take: int


class _Span(NamedTuple):
    """Rows of one run in a segment: tokens `[first, last)` of `n_tokens`, whole groups, go to token `at`.

    `ranges` and `checksums` are those of the layer's share of each tensor, which `packer` has packed. A tuple, since a
    layer of 8,192 tokens has 64, and a frozen dataclass takes three times as long to make.
    """

    source: int
    n_tokens: int
    first: int
    last: int
    at: int
    ranges: tuple[tuple[int, int], ...]
    checksums: tuple[int | None, ...]
    packer: ByteCodec | None


@dataclass(slots=True)
class _Segment:
    """Spans of one recipe, raw where they are packed. Of the `held` tokens `shown` are used, after `lead` others.

    `tensors` say nothing of places and lengths.
    """

    recipe: Recipe
    tensors: tuple[Tensor, ...]
    lead: int
    spans: list[_Span] = field(default_factory=list)
    held: int = 0
    shown: int = 0

    @property
    def group_tokens(self) -> int:
        """Tokens that only go together."""
        return max(tensor.group_tokens for tensor in self.tensors)

    def takes(self, recipe: Recipe, lead: int) -> bool:
        """Whether rows of this recipe, that many of them not used, may follow: nothing unused comes in between."""
        return not lead and self.lead + self.shown == self.held and self.recipe == recipe


def layer_ranges(blocks: Sequence[HitBlock], layer: int) -> list[Range]:
    """What is read for one layer, in the order in which a stream carries it: by block, run, stack, tensor."""
    return [
        Range(source, *tensor.layer_range(position, run.n_tokens))
        for source, run, _ in _used_runs(blocks)
        for stack, position in _stacks_of(run, layer)
        for tensor in stack.tensors
        if tensor.layer_bytes(run.n_tokens)
    ]


def _used_runs(blocks: Sequence[HitBlock]) -> Iterator[tuple[int, Run, int]]:
    """(block number, run, how many of its shown tokens are used) of every run that is used at all."""
    for source, block in enumerate(blocks):
        left = block.take
        for run in block.runs:
            if left <= 0:
                break
            yield source, run, min(run.shown, left)
            left -= run.shown
        if left > 0:
            raise BlockCorruptError(f"block {source} shows {left} tokens less than its plan takes", source)


def _stacks_of(run: Run, layer: int) -> Iterator[tuple[Stack, int]]:
    """Stacks that hold the layer, and its position in them."""
    for stack in run.stacks:
        if layer in stack.layers:
            yield stack, stack.layers.index(layer)


def _segments(part_name: str, part: PartSpec, layer: int, blocks: Sequence[HitBlock]) -> list[_Segment]:
    """Segments of one part of a layer. BlockCorruptError when a run does not hold what the layout says it must."""
    segments: list[_Segment] = []
    for source, run, used in _used_runs(blocks):
        stack, position = _find_stack(run, source, part_name, layer)
        tensors = _checked_tensors(stack, part, source)
        packer = packer_of(stack.recipe)
        recipe = stack.recipe if packer is None else RAW
        # Whole groups, with the `used` first of the tokens that the run shows.
        group = max([tensor.group_tokens for tensor in tensors])
        first = run.skip // group * group
        last = -(-(run.skip + used) // group) * group
        if not segments or not segments[-1].takes(recipe, run.skip - first):
            segments.append(_Segment(recipe, tensors, run.skip - first))
        segment = segments[-1]
        ranges = tuple([tensor.layer_range(position, run.n_tokens) for tensor in stack.tensors])
        checksums = tuple([tensor.checksum(position) for tensor in stack.tensors])
        segment.spans.append(_Span(source, run.n_tokens, first, last, segment.held, ranges, checksums, packer))
        segment.held += last - first
        segment.shown += used
    return segments


def _find_stack(run: Run, source: int, part_name: str, layer: int) -> tuple[Stack, int]:
    """The one stack that holds this part of the layer, and the layer's position in it."""
    found = [stack for stack in run.stacks if stack.part == part_name and layer in stack.layers]
    if len(found) != 1:
        raise BlockCorruptError(f"block {source} does not hold the {part_name} of layer {layer} once", source)
    return found[0], found[0].layers.index(layer)


def _checked_tensors(stack: Stack, part: PartSpec, source: int) -> tuple[Tensor, ...]:
    """The stack's tensors without where they are, if they are what its recipe makes of this part."""
    packed = packer_of(stack.recipe) is not None
    try:
        tensors = _tensors_of(part, stack.recipe)
    except CorruptDataError as error:
        raise BlockCorruptError(f"block {source}: {error}", source) from error
    fits = len(tensors) == len(stack.tensors) and all(
        stored.is_like(tensor) and bool(stored.lengths) == packed
        for stored, tensor in zip(stack.tensors, tensors, strict=True)
    )
    if not fits:
        raise BlockCorruptError(f"block {source}: tensors do not fit recipe {stack.recipe.name}", source)
    return tensors


@functools.lru_cache(256)
def _tensors_of(part: PartSpec, recipe: Recipe) -> tuple[Tensor, ...]:
    """What a recipe makes of a part. CorruptDataError when it cannot be made of it."""
    return codec_of(recipe).tensors(part, recipe)


@dataclass(frozen=True, slots=True)
class _Filler:
    """Fills tensors of a virtual file with the rows of their segments."""

    reader: RangeReader
    verify: bool

    def fill(self, segment: _Segment, index: int, capacity: int, view: memoryview) -> None:
        """Tensor `index` of a segment as `[1, heads, capacity, width]`; rows beyond the segment's are zero."""
        tensor = segment.tensors[index]
        row, rows = tensor.row_bytes, tensor.rows(segment.held)
        heads = [view[head * capacity * row : (head + 1) * capacity * row] for head in range(tensor.heads)]
        self._fill_spans(heads, tensor, segment.spans, index)
        if rows < capacity:
            zeros = bytes((capacity - rows) * row)
            for head in heads:
                head[rows * row :] = zeros

    def _fill_spans(self, heads: list[memoryview], tensor: Tensor, spans: Sequence[_Span], index: int) -> None:
        """All spans; large tensors with a second thread that takes every span that this one has not come to."""
        waiting = iter(spans)

        def fill() -> None:
            for span in waiting:
                self._fill_span(heads, tensor, span, index)

        if len(spans) == 1 or sum(tensor.layer_bytes(span.n_tokens) for span in spans) < HELPED_BYTES:
            fill()
            return
        helper = _HELPERS.submit(fill)
        try:
            fill()
        finally:
            wait([helper])
        helper.result()

    def _fill_span(self, heads: list[memoryview], tensor: Tensor, span: _Span, index: int) -> None:
        """One read of the whole stored range; rows that are not used go to scratch, but are verified with the rest."""
        row, skipped, end = tensor.row_bytes, tensor.rows(span.first), tensor.rows(span.last)
        skip, shown, rest = skipped * row, (end - skipped) * row, (tensor.rows(span.n_tokens) - end) * row
        at = tensor.rows(span.at) * row
        if span.packer is not None:
            share = self._unpacked(tensor, span, index)
            for number, head in enumerate(heads):
                begin = number * (skip + shown + rest) + skip
                head[at : at + shown] = share[begin : begin + shown]
            return
        if not skip and not rest:
            self._read(span, index, [head[at : at + shown] for head in heads])
            return
        scratch = memoryview(bytearray((skip + rest) * len(heads)))
        views: list[memoryview] = []
        for number, head in enumerate(heads):
            unused = scratch[number * (skip + rest) : (number + 1) * (skip + rest)]
            views += (part for part in (unused[:skip], head[at : at + shown], unused[skip:]) if part.nbytes)
        self._read(span, index, views)

    def _unpacked(self, tensor: Tensor, span: _Span, index: int) -> memoryview:
        """The bytes of a packed share: read, verified, unpacked."""
        assert span.packer is not None
        packed = memoryview(bytearray(span.ranges[index][1]))
        self._read(span, index, [packed])
        try:
            share = span.packer.unpack(packed, tensor.layer_bytes(span.n_tokens), ITEM_BYTES[tensor.dtype])
        except CorruptDataError as error:
            raise BlockCorruptError(f"block {span.source}: {error}", span.source) from error
        return share.data

    def _read(self, span: _Span, index: int, views: list[memoryview]) -> None:
        try:
            self.reader.readinto(span.source, span.ranges[index][0], views)
        except BlockCorruptError:
            raise
        except CorruptDataError as error:
            raise BlockCorruptError(str(error), span.source) from error
        if self.verify:
            verify_range(views, span.checksums[index], span.source)


def assemble_layer(
    layout: Layout,
    layer: int,
    blocks: Sequence[HitBlock],
    reader: RangeReader,
    headroom_tokens: int = BLOCK_TOKENS,
    verify: bool = True,
    keep_codes: bool = False,
) -> KVLayer:
    """One kv layer of a hit, in buffers of its tokens and head-room, rounded up to 256 rows; unused rows are zero.

    `keep_codes`: where all of the layer is affine of one kind it comes as an engine keeps a quantized cache, as codes,
    scales and biases, under a spec that says so. Everything is read when this returns; decoding may still be lazy, so
    evaluate on this thread. Raises BlockCorruptError (a CorruptDataError with `.source`) for damaged, missing or
    misdescribed data, UnknownFormatError for a recipe that this build cannot read, OSError if the disk fails.
    """
    spec = layout.layers[layer]
    assert not spec.is_exact, "window and state layers come from a checkpoint: see states.py"
    n_tokens = sum(block.take for block in blocks)
    capacity = -(-(n_tokens + headroom_tokens) // BLOCK_TOKENS) * BLOCK_TOKENS
    plan = {part: _segments(part, spec.part(part), layer, blocks) for part in PARTS if spec.part(part).width}
    loaded = _load(plan, capacity - n_tokens, _Filler(reader, verify))
    if keep_codes and (quantized := _quantized_spec(spec, plan)):
        keys, values = (tuple(loaded[part][0]) for part in PARTS)
        return KVLayer(quantized, keys, values, n_tokens)
    parts = {part: _decoded(spec.part(part), segments, loaded[part], capacity) for part, segments in plan.items()}
    return KVLayer(spec, parts.get("keys", ()), parts.get("values", ()), n_tokens)


def _quantized_spec(spec: LayerSpec, plan: dict[str, list[_Segment]]) -> LayerSpec | None:
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
    plan = {part: _segments(part, spec.part(part), layer, blocks) for part in PARTS if spec.part(part).width}
    if any(segment.group_tokens > 1 for segments in plan.values() for segment in segments):
        raise InvalidRequestError(f"layer {layer} is stored in groups of tokens, which cannot be cut without decoding")
    loaded = _load(plan, 0, _Filler(reader, verify=True))
    return {
        part: [(segment.recipe, tensors) for segment, tensors in zip(segments, loaded[part], strict=True)]
        for part, segments in plan.items()
    }


def _load(plan: dict[str, list[_Segment]], spare_tokens: int, filler: _Filler) -> dict[str, list[list[mx.array]]]:
    """The tensors of every segment of every part, with `spare_tokens` rows of zeros behind the last."""
    file = VirtualFile()
    for part, segments in plan.items():
        for number, segment in enumerate(segments):
            spare = spare_tokens if number == len(segments) - 1 and segment.group_tokens == 1 else 0
            for index, tensor in enumerate(segment.tensors):
                rows = tensor.rows(segment.held + spare)
                shape = (1, tensor.heads, rows, tensor.width)
                fill = functools.partial(filler.fill, segment, index, rows)
                file.add(f"{part}.{number}.{index}", tensor.dtype, shape, fill)
    arrays = file.load() if plan else {}
    return {
        part: [
            [arrays[f"{part}.{number}.{index}"] for index in range(len(segment.tensors))]
            for number, segment in enumerate(segments)
        ]
        for part, segments in plan.items()
    }


def _decoded(
    part: PartSpec, segments: Sequence[_Segment], loaded: Sequence[list[mx.array]], capacity: int
) -> tuple[mx.array, ...]:
    """The arrays of a part: decoded and put together, or as they are where the engine keeps them quantized."""
    if part.bits:
        return tuple(loaded[0])
    decoded = [_decode(segment, tensors, part) for segment, tensors in zip(segments, loaded, strict=True)]
    missing = capacity - sum(array.shape[2] for array in decoded)
    if missing:
        decoded.append(device.zeros((1, part.heads, missing, part.width), part.dtype))
    return (decoded[0] if len(decoded) == 1 else mx.concatenate(decoded, axis=2),)


def _decode(segment: _Segment, tensors: Sequence[mx.array], part: PartSpec) -> mx.array:
    """A segment's rows, and those of the head-room behind it; without what its groups hold beside them."""
    array = codec_of(segment.recipe).decode(tensors, segment.recipe, part)
    if segment.lead + segment.shown == segment.held and not segment.lead:
        return array
    return mx.contiguous(array[:, :, segment.lead : segment.lead + segment.shown])


def dense_runs(layout: Layout, rows_of_runs: Sequence[int], fidelity: int = FIDELITY_EXACT) -> tuple[Run, ...]:
    """The raw runs, of so many tokens each, that a dense answer is, as if it were one block; without checksums."""
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
