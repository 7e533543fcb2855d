"""Blocks and layouts: serial forms, limits, and the order in which raw KV travels."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.blocks import (
    FIDELITY_EXACT,
    RAW,
    Block,
    LayerState,
    Recipe,
    Run,
    Stack,
    StateArray,
    Tensor,
    pack_tokens,
)
from kvstore.core.layers import NO_PART, ArraySpec, LayerSpec, Layout, PartSpec, cut_pieces, raw_ranges
from kvstore.core.records import (
    block_from_record,
    block_to_record,
    parse_template,
    runs_from_record,
    runs_to_record,
    template_of,
    templates_by_id,
)
from kvstore.errors import CorruptDataError, InvalidRequestError

AFFINE = Recipe("affine", 1, (("bits", 8), ("group", 64)))
KEYS = Stack("keys", (0, 1), AFFINE, (Tensor("codes", "U32", 2, 16, 0, b"12345678" * 2),))
VALUES = Stack("values", (0, 1), RAW, (Tensor("data", "BF16", 2, 64, 1280, b"abcdefgh" * 2),))
RUN = Run(5, 1, 3, 800, (KEYS, VALUES))
BLOCK = Block(b"r" * 32, b"p" * 32, b"k" * 32, 256, pack_tokens([1, 2, 3]), 800, (RUN,), 1_700_000_000, b"ns")


def test_a_block_record_comes_back_equal() -> None:
    """Every field, recipes and checksums included."""
    assert block_from_record(block_to_record(BLOCK)) == BLOCK


@pytest.mark.parametrize(
    "broken",
    [
        replace(BLOCK, tokens=pack_tokens([1, 2])),
        replace(BLOCK, tokens=b""),
        replace(BLOCK, key=b"short"),
        replace(BLOCK, runs=(replace(RUN, skip=3),)),
        replace(BLOCK, runs=(replace(RUN, shown=0), RUN)),
        replace(BLOCK, runs=(replace(RUN, stacks=(replace(KEYS, part="queries"),)),)),
        replace(BLOCK, runs=(replace(RUN, stacks=(replace(KEYS, tensors=(Tensor("a/b", "U32", 1, 1),)),)),)),
        replace(BLOCK, runs=(replace(RUN, stacks=(replace(KEYS, tensors=(Tensor("a", "F64", 1, 1),)),)),)),
        replace(BLOCK, runs=(replace(RUN, stacks=(replace(KEYS, tensors=(Tensor("a", "U32", 1, 1, 0, b"1"),)),)),)),
        replace(BLOCK, start=-1),
    ],
)
def test_a_record_that_contradicts_itself_is_corrupt(broken: Block) -> None:
    """Coverage, names, dtypes, ranges: checked on every parse."""
    with pytest.raises(CorruptDataError):
        block_from_record(block_to_record(broken))


PACKED = Tensor("data", "BF16", 2, 64, 640, b"12345678" * 2, (700, 1))
GROUPED = Tensor("scales", "BF16", 2, 64, 0, b"12345678" * 2, (), 64)


def of_tensors(n_tokens: int, *tensors: Tensor) -> Block:
    """A block of one run with one stack of two layers."""
    stack = Stack("keys", (0, 1), Recipe("some"), tensors)
    return replace(BLOCK, runs=(Run(n_tokens, 1, 3, 800, (stack,)),))


def test_packed_and_grouped_tensors_come_back_equal() -> None:
    """Offsets follow from the order; of packed tensors, from their lengths."""
    for block in (of_tensors(5, replace(PACKED, offset=0)), of_tensors(128, GROUPED, replace(PACKED, offset=1024))):
        assert block_from_record(block_to_record(block)) == block
    assert PACKED.layer_range(1, 5) == (1340, 1)
    assert PACKED.stored_bytes(2, 5) == 701
    assert (GROUPED.rows(128), GROUPED.layer_bytes(128), GROUPED.layer_range(1, 128)) == (2, 512, (512, 512))


@pytest.mark.parametrize(
    "broken",
    [
        of_tensors(5, replace(PACKED, lengths=(700,))),
        of_tensors(5, replace(PACKED, lengths=(700, 0))),
        of_tensors(5, replace(PACKED, lengths=(5 * 256 + 300, 1))),
        of_tensors(5, replace(PACKED, lengths=(700, 1), width=1 << 40)),
        of_tensors(127, GROUPED),
        of_tensors(128, replace(GROUPED, group_tokens=3)),
    ],
)
def test_lengths_and_groups_that_cannot_be_are_corrupt(broken: Block) -> None:
    """One length a layer, none empty or longer than packing makes it, none that stands for gigabytes; whole groups."""
    with pytest.raises(CorruptDataError):
        block_from_record(block_to_record(broken))


@given(st.binary(max_size=300))
def test_random_bytes_are_never_a_block(junk: bytes) -> None:
    """One typed error whatever the bytes are."""
    with pytest.raises(CorruptDataError):
        block_from_record(junk)


def test_runs_of_one_kind_share_a_template() -> None:
    """However many there are, and whatever their tokens, fidelity and checksums; runs without checksums too."""
    bare = tuple(
        replace(stack, tensors=tuple(replace(each, checksums=b"") for each in stack.tensors)) for stack in RUN.stacks
    )
    places = [replace(RUN, n_tokens=9, skip=0), replace(RUN, fidelity=1), replace(RUN, stacks=bare)]
    data, templates = runs_to_record((RUN, *places))
    assert set(templates) == {template_of(RUN).id}
    assert templates_by_id(list(templates.values())) == templates
    parsed = runs_from_record(data, templates)
    assert [(run.n_tokens, run.skip, run.fidelity) for run in parsed] == [
        (5, 1, 800),
        (9, 0, 800),
        (5, 1, 1),
        (5, 1, 800),
    ]
    assert [bool(run.stacks[0].tensors[0].checksums) for run in parsed] == [True, True, True, False]
    ends = itertools.accumulate(run.nbytes() for run in parsed)
    assert [run.stacks[0].tensors[0].offset for run in parsed] == [0, *list(ends)[:-1]]


def test_references_of_a_recipe_travel_with_it_and_only_digests_are_taken() -> None:
    """A decoder must know which files it needs; a record without references is as short as before."""
    recipe = replace(RUN.stacks[0].recipe, references=(bytes(range(32)),))
    run = replace(RUN, stacks=(replace(RUN.stacks[0], recipe=recipe), *RUN.stacks[1:]))
    data, templates = runs_to_record((run,))
    assert runs_from_record(data, templates)[0].stacks[0].recipe == recipe
    assert str(recipe).endswith("@" + bytes(range(32)).hex())
    for bad in ([], [b"short"], [bytes(32)] * 99, ["0" * 32], [7]):
        fields = msgpack.unpackb(template_of(run).record)
        fields[0][2][3] = bad
        with pytest.raises(CorruptDataError):
            parse_template(msgpack.packb(fields))


def test_runs_whose_template_is_another_one_are_corrupt() -> None:
    """Not there, or not what its name says: then nothing is taken from it."""
    data, templates = runs_to_record((RUN,))
    with pytest.raises(CorruptDataError, match="template"):
        runs_from_record(data, {})
    other = template_of(replace(RUN, stacks=RUN.stacks[:1]))
    with pytest.raises(CorruptDataError, match="template"):
        runs_from_record(data, {other.id: other.record})
    for broken in (b"", data[:-1], data + b"\0", data[:5]):
        with contextlib.suppress(CorruptDataError):
            assert runs_from_record(broken, templates) == ()


@given(st.binary(max_size=200))
def test_random_bytes_are_never_a_template_or_runs_of_one(junk: bytes) -> None:
    """One typed error whatever the bytes are; no bytes are no runs."""
    with contextlib.suppress(CorruptDataError):
        assert parse_template(junk).stacks == ()
    data, templates = runs_to_record((RUN,))
    with contextlib.suppress(CorruptDataError):
        assert runs_from_record(junk, templates) == ()
    with contextlib.suppress(CorruptDataError):
        runs_from_record(data[:28] + junk, templates)


@given(st.booleans(), st.integers(0, 400), st.binary(min_size=1, max_size=4))
def test_a_damaged_record_is_corrupt_or_parses(packed: bool, at: int, patch: bytes) -> None:
    """Damage never ends in another exception."""
    record = bytearray(block_to_record(of_tensors(128, GROUPED, PACKED) if packed else BLOCK))
    at %= len(record)
    record[at : at + len(patch)] = patch
    with contextlib.suppress(CorruptDataError):
        block_from_record(bytes(record))


def test_a_nested_record_bomb_is_corrupt() -> None:
    """Depth is msgpack's to limit; it must come out as our error."""
    with pytest.raises(CorruptDataError):
        block_from_record(b"\x91" * 100_000)


def test_raw_order_is_stack_by_stack_and_without_gaps() -> None:
    """The bytes of a piece tile it exactly, keys before values."""
    layout = Layout(
        (
            LayerSpec(PartSpec(2, 64, "BF16"), PartSpec(2, 32, "BF16")),
            LayerSpec(PartSpec(4, 64, "BF16", 8, 64), PartSpec(4, 0, "BF16")),
            LayerSpec(PartSpec(2, 64, "BF16"), PartSpec(2, 32, "BF16")),
        )
    )
    ranges = list(raw_ranges(layout, 7))
    assert [r[3] for r in ranges] == [sum(x[4] for x in ranges[:i]) for i in range(len(ranges))]
    assert sum(r[4] for r in ranges) == 7 * layout.token_bytes
    assert [r[2] for r in ranges] == [0, 2, 1, 1, 1, 0, 2]
    assert sum(layout.layer_token_bytes(i) for i in range(3)) == layout.token_bytes


def test_a_layout_record_comes_back_equal_and_small() -> None:
    """Equal layers are written once: a deep model's layout stays a few hundred bytes."""
    part = PartSpec(8, 128, "BF16")
    layout = Layout((LayerSpec(part, part),) * 80)
    assert Layout.from_record(layout.record) == layout
    assert len(layout.record) < 300


def test_a_layout_is_parsed_once() -> None:
    """Every request names it, and what follows from it is remembered with it."""
    part = PartSpec(8, 96, "BF16")
    record = Layout((LayerSpec(part, part),)).record
    assert Layout.from_record(record) is Layout.from_record(bytes(bytearray(record)))


@pytest.mark.parametrize(
    "layer",
    [
        LayerSpec(PartSpec(0, 64, "BF16"), PartSpec(2, 64, "BF16")),
        LayerSpec(PartSpec(2, 64, "F64"), PartSpec(2, 64, "BF16")),
        LayerSpec(PartSpec(2, 0, "BF16"), PartSpec(2, 0, "BF16")),
        LayerSpec(PartSpec(2, 64, "BF16", 7, 64), PartSpec(2, 64, "BF16")),
        LayerSpec(PartSpec(2, 48, "BF16", 8, 32), PartSpec(2, 64, "BF16")),
        LayerSpec(PartSpec(2, 64, "BF16", 0, 64), PartSpec(2, 64, "BF16")),
        LayerSpec(PartSpec(1 << 40, 64, "BF16"), PartSpec(2, 64, "BF16")),
        LayerSpec(PartSpec(2, 64, "BF16"), PartSpec(2, 64, "BF16"), "attention"),
        LayerSpec(PartSpec(2, 64, "BF16"), PartSpec(2, 64, "BF16"), "window"),
        LayerSpec(PartSpec(2, 64, "BF16"), PartSpec(2, 64, "BF16"), "window", (("size", 8),)),
        LayerSpec(PartSpec(2, 64, "BF16"), PartSpec(2, 64, "BF16"), "window", (("size", 8), ("keep", 8))),
        LayerSpec(PartSpec(2, 64, "BF16"), PartSpec(2, 64, "BF16"), "window", (("chunk", 0),)),
        LayerSpec(PartSpec(2, 64, "BF16", 8, 64), PartSpec(2, 64, "BF16"), "window", (("chunk", 8),)),
        LayerSpec(NO_PART, NO_PART, "state", (("slots", 1),)),
        LayerSpec(NO_PART, NO_PART, "state", (("slots", 1),), (ArraySpec("a", "F32", (1,)),) * 2),
        LayerSpec(NO_PART, NO_PART, "state", (("slots", 1),), (ArraySpec("a", "F64", (1,)),)),
        LayerSpec(NO_PART, NO_PART, "state", (("slots", 1),), (ArraySpec("a b", "F32", (1,)),)),
        LayerSpec(NO_PART, NO_PART, "state", (("slots", 1),), (ArraySpec("a", "F32", (1,) * 9),)),
        LayerSpec(NO_PART, NO_PART, "state", (("slots", 1),), (ArraySpec("a", "F32", (1, -1)),)),
        LayerSpec(NO_PART, NO_PART, "state", (("slots", 1),), (ArraySpec("a", "F32", (1 << 31,)),)),
        LayerSpec(NO_PART, NO_PART, "state", (("slots", 1),), (ArraySpec("a", "F32", (1, 3), 1),)),
        LayerSpec(NO_PART, NO_PART, "state", (("slots", 1),), (ArraySpec("a", "F32", (1, 0), 2),)),
        LayerSpec(NO_PART, NO_PART, "state", (("slots", 1),), (ArraySpec("a", "F32", (1, 3), -1, 5),)),
        LayerSpec(PartSpec(2, 64, "BF16"), PartSpec(2, 64, "BF16"), arrays=(ArraySpec("a", "F32", (1,)),)),
    ],
)
def test_a_layout_that_cannot_be_stored_is_refused(layer: LayerSpec) -> None:
    """Before it becomes part of anybody's identity."""
    with pytest.raises(InvalidRequestError):
        Layout((layer,)).validate()


@pytest.mark.parametrize(
    "record", [b"", b"\x90", msgpack.packb([[], [], ""]), msgpack.packb([[["kv", [1], [1], []]], [0], ""])]
)
def test_a_layout_record_that_is_none_is_refused(record: bytes) -> None:
    """As an invalid request, since it comes from a peer."""
    with pytest.raises(InvalidRequestError):
        Layout.from_record(record)


@given(st.integers(0, 2000), st.integers(1, 2000), st.integers(0, 3000))
def test_pieces_tile_the_range_inside_blocks_and_origins(start: int, length: int, restored: int) -> None:
    """No piece crosses a block edge or the end of what was restored; together they are the range."""
    pieces = cut_pieces(start, start + length, restored)
    assert pieces[0].start == start and pieces[-1].end == start + length
    assert all(a.end == b.start for a, b in itertools.pairwise(pieces))
    for piece in pieces:
        assert piece.start // 256 == (piece.end - 1) // 256
        assert piece.restored == (piece.end <= restored)


def test_fidelity_ranks_exact_above_every_codec() -> None:
    """Sixteen bits of a codec are still not the exact values."""
    assert FIDELITY_EXACT > 100 * 32


STATES = (
    LayerState(1, (("offset", 300),), (StateArray("keys", "BF16", (1, 2, 32, 64), 0, b"12345678"),)),
    LayerState(3, (), (StateArray("a0", "F32", (1, 0, 4)), StateArray("a1", "I64", (7,), 8192, b"87654321"))),
)
CHECKPOINT = Block(b"r" * 32, b"p" * 32, b"c" * 32, 256, pack_tokens([1, 2]), 800, (), 1_700_000_000, b"ns", STATES)


@pytest.mark.parametrize("tokens", [[], [1, 2]])
def test_a_checkpoint_record_comes_back_equal(tokens: list[int]) -> None:
    """A checkpoint may stand exactly at a block's end, where it has no tokens of its own."""
    checkpoint = replace(CHECKPOINT, tokens=pack_tokens(tokens))
    assert block_from_record(block_to_record(checkpoint)) == checkpoint
    assert checkpoint.is_checkpoint
    assert checkpoint.end == 256 + len(tokens)


@pytest.mark.parametrize(
    "broken",
    [
        replace(CHECKPOINT, runs=(RUN,)),
        replace(CHECKPOINT, tokens=pack_tokens(list(range(256)))),
        replace(CHECKPOINT, start=0, tokens=b""),
        replace(CHECKPOINT, states=STATES[::-1]),
        replace(CHECKPOINT, states=(replace(STATES[0], arrays=(StateArray("../x", "F32", (1,)),)),)),
        replace(CHECKPOINT, states=(replace(STATES[0], arrays=(StateArray("x", "F32", (-1,)),)),)),
        replace(CHECKPOINT, states=(replace(STATES[0], arrays=(StateArray("x", "F32", (1,) * 9),)),)),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_corrupt(broken: Block) -> None:
    """States stand alone, in order, with names and shapes that can be."""
    with pytest.raises(CorruptDataError):
        block_from_record(block_to_record(broken))


def test_exact_layers_travel_in_checkpoints_not_in_blocks() -> None:
    """Window and state layers have no bytes a token."""
    part = PartSpec(2, 64, "BF16")
    window = LayerSpec(part, part, "window", (("size", 32), ("keep", 0)))
    rules = (ArraySpec("slot0", "F32", (1, 3, 8)), ArraySpec("slot1", "I64", (1, 0), 1, optional=True))
    state = LayerSpec(NO_PART, NO_PART, "state", (("slots", 2),), rules)
    layout = Layout((LayerSpec(part, part), window, state), ".(..)")
    layout.validate()
    assert Layout.from_record(layout.record) == layout
    assert layout.exact_layers == (1, 2)
    assert layout.token_bytes == layout.layer_token_bytes(0) == 2 * 2 * 64 * 2
    assert layout.digest != replace(layout, tree="").digest


@pytest.mark.parametrize("tree", ["..", "(...", "...)(", "(...)()", "..x", ")...("])
def test_a_nesting_that_does_not_fit_is_refused(tree: str) -> None:
    """Brackets balance around exactly the layers."""
    with pytest.raises(InvalidRequestError):
        Layout((LayerSpec(PartSpec(2, 64, "BF16"), PartSpec(2, 64, "BF16")),) * 3, tree).validate()
