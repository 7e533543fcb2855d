"""Decoding in pieces gives the bytes that decoding at once gives, and the lane is free between two pieces."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvstore.blobs.ranges import FileReader, FileSource
from kvstore.codecs.assemble import assemble_layer, dense_bytes
from kvstore.codecs.byte_plan import HitBlock
from kvstore.codecs.codec import BlockCorruptError
from kvstore.codecs.encode import encode_run
from kvstore.codecs.profiles import parse_profile
from kvstore.codecs.runs import payload_run
from kvstore.core.layers import LayerSpec, Layout, PartSpec
from kvstore.server.fetching import decode
from kvstore.server.fetching.decode import decode_piece, pieces
from kvstore.server.lane import Lane
from tests.support.stored import finish_runs, random_payload, write_source

PLAIN = PartSpec(2, 64, "BF16")
LAYOUTS = {
    "plain": Layout((LayerSpec(PLAIN, PLAIN),) * 2),
    "latent": Layout((LayerSpec(PartSpec(1, 64, "F16"), PartSpec(1, 0, "F16")),) * 2),
    "folded": Layout((LayerSpec(PartSpec(4, 40, "F32"), PartSpec(4, 40, "F32")),) * 2),
}
TAKES = (256, 256, 256, 100)


class Pieces:
    """The sizes of the pieces that were decoded."""

    def __init__(self) -> None:
        self.nbytes: list[int] = []

    def __call__(self, nbytes: int, seconds: float) -> None:
        assert seconds >= 0
        self.nbytes.append(nbytes)


@pytest.fixture
def lane() -> Iterator[Lane]:
    """A lane of its own."""
    running = Lane()
    yield running
    running.close()


def stored(folder: Path, layout: Layout, profile: str) -> tuple[list[HitBlock], list[FileSource]]:
    """Blocks in files, the last of which is used in part."""
    rng = np.random.default_rng(5)
    blocks, sources = [], []
    for number, take in enumerate(TAKES):
        payload = random_payload(rng, layout.layers[0].keys.dtype, 256 * layout.token_bytes // _item(layout))
        runs, sealed = finish_runs([encode_run(layout, payload_run(layout, payload, 256), parse_profile(profile))])
        blocks.append(HitBlock(runs, take))
        sources.append(write_source(folder / str(number), sealed))
    return blocks, sources


def _item(layout: Layout) -> int:
    return 4 if layout.layers[0].keys.dtype == "F32" else 2


def at_once(layout: Layout, layer: int, blocks: Sequence[HitBlock], reader: FileReader) -> bytes:
    """The layer decoded as a whole."""
    return b"".join(dense_bytes(assemble_layer(layout, layer, blocks, reader, headroom_tokens=0)))


def dense_layer(
    lane: Lane, layout: Layout, layer: int, blocks: Sequence[HitBlock], reader: FileReader, told: Pieces
) -> list[bytes]:
    """The layer decoded in pieces that are put together again."""
    tensors = [tensor for stack in layout.raw_stacks if layer in stack.layers for tensor in stack.tensors]
    rows: list[list[np.ndarray]] = [[] for _ in tensors]
    for first, group in pieces(blocks, layout.layer_token_bytes(layer)):
        views = decode_piece(lane.submit_fetch, layout, layer, group, first, reader, told).result(60)
        for tensor, view, parts in zip(tensors, views, rows, strict=True):
            parts.append(np.frombuffer(view, np.uint8).reshape(tensor.heads, sum(b.take for b in group), -1))
    return [np.concatenate(parts, axis=1).tobytes() for parts in rows]


@pytest.mark.parametrize("profile", ["raw", "affine8"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_pieces_give_the_bytes_of_the_whole(
    name: str, profile: str, lane: Lane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block a piece, two, all."""
    layout = LAYOUTS[name]
    blocks, sources = stored(tmp_path, layout, profile)
    token_bytes = layout.layer_token_bytes(1)
    for blocks_each, count in ((1, 4), (2, 2), (9, 1)):
        monkeypatch.setattr(decode, "PIECE_BYTES", blocks_each * 256 * token_bytes)
        told = Pieces()
        with contextlib.closing(FileReader(sources)) as reader:
            got = dense_layer(lane, layout, 1, blocks, reader, told)
            assert b"".join(got) == at_once(layout, 1, blocks, reader)
        assert (len(told.nbytes), sum(told.nbytes)) == (count, sum(TAKES) * token_bytes)


def test_pieces_are_whole_blocks_of_at_most_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """And at least one, however large."""
    monkeypatch.setattr(decode, "PIECE_BYTES", 1000)
    blocks = [HitBlock((), take) for take in (50, 50, 200, 10, 90, 1)]
    assert [(first, [one.take for one in group]) for first, group in pieces(blocks, 10)] == [
        (0, [50, 50]),
        (2, [200]),
        (3, [10, 90]),
        (5, [1]),
    ]
    assert list(pieces([], 10)) == []


def test_damage_names_the_block_of_the_hit(lane: Lane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not its place in the piece; whether it does not verify, or is gone."""
    layout = LAYOUTS["plain"]
    blocks, sources = stored(tmp_path, layout, "affine8")
    monkeypatch.setattr(decode, "PIECE_BYTES", 2 * 256 * layout.layer_token_bytes(0))
    path = Path(sources[3].path)
    good = path.read_bytes()
    for harm in (lambda: path.write_bytes(good[:-1] + bytes([good[-1] ^ 1])), path.unlink):
        harm()
        with contextlib.closing(FileReader(sources)) as reader, pytest.raises(BlockCorruptError) as caught:
            dense_layer(lane, layout, 1, blocks, reader, Pieces())
        assert caught.value.source == 3


def test_reading_happens_outside_the_lane_and_others_come_between(
    lane: Lane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk holds up nobody's decoding."""
    layout = LAYOUTS["plain"]
    blocks, sources = stored(tmp_path, layout, "affine8")
    monkeypatch.setattr(decode, "PIECE_BYTES", 1)
    others: list[int] = []

    class Watched(FileReader):
        def readinto(self, source: int, offset: int, views: Sequence[memoryview]) -> None:
            assert threading.current_thread() is not lane._fetches._thread
            others.append(lane.submit_fetch(lambda: source).result(60))
            super().readinto(source, offset, views)

    with contextlib.closing(Watched(sources)) as reader:
        dense_layer(lane, layout, 0, blocks, reader, Pieces())
    assert sorted(set(others)) == [0, 1, 2, 3]


def test_the_rows_of_a_hit_are_those_of_its_blocks(lane: Lane, tmp_path: Path) -> None:
    """A longer cut of the same blocks only appends rows."""
    layout = LAYOUTS["plain"]
    blocks, sources = stored(tmp_path, layout, "raw")
    with contextlib.closing(FileReader(sources)) as reader:
        whole = dense_layer(lane, layout, 0, blocks, reader, Pieces())
        shorter = dense_layer(lane, layout, 0, [*blocks[:-1], replace(blocks[-1], take=1)], reader, Pieces())
    for long, short in zip(whole, shorter, strict=True):
        rows = [np.frombuffer(one, np.uint16).reshape(2, -1, 64) for one in (long, short)]
        assert np.array_equal(rows[0][:, : 3 * 256 + 1], rows[1])
