"""Plans of byte ranges: which stored ranges make up a layer of a hit, and where their rows go. Needs only the runs.

Adjacent runs of one recipe share a segment, which is decoded at once. Rows that a byte codec packed are unpacked when
they are read, and share segments with raw rows. A group codec stores whole groups: if a hit starts or ends inside a
group, the surplus rows are cut after decoding, so a segment starts or ends there too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.blobs.ranges import Range
from kvstore.codecs.codec import BlockCorruptError, ByteCodec, packer_of, tensors_of, unpacked
from kvstore.core import rules
from kvstore.core.blocks import Block, Recipe, Run, Stack, Tensor
from kvstore.core.layers import Layout, PartSpec
from kvstore.errors import CorruptDataError


@dataclass(frozen=True, slots=True)
class HitBlock:
    """One block of a hit: its runs, and how many of its leading tokens are used."""

    runs: tuple[Run, ...]
    take: int


class Span(NamedTuple):
    """Rows of one run in a segment: tokens `[first, last)` of `n_tokens`, whole groups, go to token `at`.

    They are the shares that the layer at `position` has of the tensors of `stack`, which `packer` has packed. A tuple,
    since a layer of 8,192 tokens has 64, and a frozen dataclass takes three times as long to make.
    """

    source: int
    n_tokens: int
    first: int
    last: int
    at: int
    stack: Stack
    position: int
    packer: ByteCodec | None


@dataclass(slots=True)
class Segment:
    """Spans of one recipe, that of the unpacked rows where they are packed. `shown` of `held` tokens follow `lead`.

    `start`: the token of the hit that is the first used. `tensors` say nothing of places and lengths.
    """

    recipe: Recipe
    tensors: tuple[Tensor, ...]
    lead: int
    start: int
    spans: list[Span] = field(default_factory=list)
    held: int = 0
    shown: int = 0

    @property
    def group_tokens(self) -> int:
        """Tokens per codec group: rows can be cut only at multiples of it."""
        return max(tensor.group_tokens for tensor in self.tensors)

    def takes(self, recipe: Recipe, lead: int) -> bool:
        """Whether rows of this recipe, that many of them not used, may follow: nothing unused comes in between."""
        return not lead and self.lead + self.shown == self.held and self.recipe == recipe


def check_block(layout: Layout, block: Block) -> None:
    """As `rules.check_block`, also for the tensors of each recipe. UnknownFormatError for a recipe not known here."""
    rules.check_block(layout, block)
    for run in block.runs:
        for stack in run.stacks:
            for part in {layout.layers[index].part(stack.part) for index in stack.layers}:
                _check_tensors(stack, _kind_of(stack.recipe, part, 0), 0)


def layer_ranges(blocks: Sequence[HitBlock], layer: int) -> list[Range]:
    """Byte ranges of one layer in stream order: by block, run, stack, tensor."""
    return [
        Range(source, *tensor.layer_range(position, run.n_tokens))
        for source, run, _ in _used_runs(blocks)
        for stack, position in _stacks_of(run, layer)
        for tensor in stack.tensors
        if tensor.layer_bytes(run.n_tokens)
    ]


def plan_segments(part_name: str, part: PartSpec, layer: int, blocks: Sequence[HitBlock]) -> list[Segment]:
    """Segments of one part of a layer. BlockCorruptError when a run does not hold what the layout says it must."""
    segments: list[Segment] = []
    start = 0
    known: dict[int, _Kind] = {}
    for source, run, used in _used_runs(blocks):
        stack, position = _find_stack(run, source, part_name, layer)
        # By identity, since the blocks of a plan share their recipes: comparing them would be most of the work.
        kind = known.get(id(stack.recipe))
        if kind is None:
            kind = known[id(stack.recipe)] = _kind_of(stack.recipe, part, source)
        tensors, packer, recipe, group = kind
        _check_tensors(stack, kind, source)
        # Whole groups, with the `used` first of the tokens that the run shows.
        first = run.skip // group * group
        last = -(-(run.skip + used) // group) * group
        if not segments or not segments[-1].takes(recipe, run.skip - first):
            segments.append(Segment(recipe, tensors, run.skip - first, start))
        segment = segments[-1]
        segment.spans.append(Span(source, run.n_tokens, first, last, segment.held, stack, position, packer))
        segment.held += last - first
        segment.shown += used
        start += used
    return segments


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
            raise BlockCorruptError(f"block {source} has {left} tokens fewer than the plan reads from it", source)


def _stacks_of(run: Run, layer: int) -> Iterator[tuple[Stack, int]]:
    """Stacks that hold the layer, and its position in them."""
    for stack in run.stacks:
        if layer in stack.layers:
            yield stack, stack.layers.index(layer)


def _find_stack(run: Run, source: int, part_name: str, layer: int) -> tuple[Stack, int]:
    """The one stack that holds this part of the layer, and the layer's position in it."""
    found = [stack for stack in run.stacks if stack.part == part_name and layer in stack.layers]
    if len(found) != 1:
        raise BlockCorruptError(f"block {source} does not hold the {part_name} of layer {layer} once", source)
    return found[0], found[0].layers.index(layer)


class _Kind(NamedTuple):
    """What a recipe means for a part: its tensors, without offsets; what packed them; the recipe once unpacked."""

    tensors: tuple[Tensor, ...]
    packer: ByteCodec | None
    recipe: Recipe
    group_tokens: int


def _kind_of(recipe: Recipe, part: PartSpec, source: int) -> _Kind:
    """BlockCorruptError if the recipe does not fit the part."""
    try:
        tensors = tensors_of(part, recipe)
    except CorruptDataError as error:
        raise BlockCorruptError(f"block {source}: {error}", source) from error
    group = max(tensor.group_tokens for tensor in tensors)
    return _Kind(tensors, packer_of(recipe), unpacked(recipe), group)


def _check_tensors(stack: Stack, kind: _Kind, source: int) -> None:
    """BlockCorruptError unless the stack has these tensors."""
    packed, fits = kind.packer is not None, len(kind.tensors) == len(stack.tensors)
    for stored, tensor in zip(stack.tensors, kind.tensors, strict=False):
        fits = fits and bool(stored.lengths) == packed and stored.is_like(tensor)
    if not fits:
        raise BlockCorruptError(f"block {source}: tensors do not fit recipe {stack.recipe.name}", source)
