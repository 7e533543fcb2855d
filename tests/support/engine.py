"""Tiny namespaces and blocks for engine tests: numpy only, a few bytes a token, values that follow from tokens."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.core.blocks import (
    BLOCK_TOKENS,
    FIDELITY_EXACT,
    TOKEN_BYTES,
    Block,
    LayerState,
    Origin,
    Run,
    StateArray,
    count_tokens,
    pack_tokens,
)
from kvstore.core.keys import Chain, Namespace, block_key, checkpoint_key
from kvstore.core.layers import NO_PART, ArraySpec, LayerSpec, Layout, PartSpec
from kvstore.engine import Engine, EngineOptions, Fs, Match, NewBlock, Row, Slice, StoreReceipt
from tests.support.files import paths_below, taken_bytes

LAYOUT = Layout((LayerSpec(PartSpec(1, 2, "F32"), PartSpec(1, 2, "F32")),) * 2)

# A recurrent layer beside a plain one, and nothing but recurrent layers.
# The first array has as many numbers as a test wants.
ARRAYS = (
    ArraySpec("slot0", "F32", (1, 0), 1, 1 << 30),
    ArraySpec("slot1", "I64", (0, 4)),
    ArraySpec("slot2", "BOOL", ()),
)
STATE = LayerSpec(NO_PART, NO_PART, "state", (("slots", 3),), ARRAYS)
HYBRID = Layout((STATE, LAYOUT.layers[0]))
RECURRENT = Layout((STATE, STATE))


def namespace(name: str = "weights", layout: Layout = LAYOUT) -> Namespace:
    """A namespace of, unless told otherwise, two layers with eight bytes a part, layer and token."""
    return Namespace(weights=name.encode(), layout=layout, dtype="F32", engine="test 1", alias=name)


def values(tokens: bytes, fill_bytes: int) -> np.ndarray:
    """Bytes that only these tokens have."""
    seed = int.from_bytes(hashlib.sha256(tokens).digest()[:8], "little")
    return np.random.default_rng(seed).integers(0, 256, fill_bytes, dtype=np.uint8)


def new_block(
    root: bytes, parent: bytes, start: int, tokens: bytes, fidelity: int = FIDELITY_EXACT, layout: Layout = LAYOUT
) -> NewBlock:
    """A raw block of packed tokens."""
    n_tokens = count_tokens(tokens)
    run = Run(n_tokens, 0, n_tokens, fidelity, layout.raw_stacks)
    block = Block(root, parent, block_key(parent, tokens), start, tokens, fidelity, (run,))
    buffers = [
        values(tokens + bytes([number]), len(stack.layers) * tensor.layer_bytes(n_tokens))
        for number, (stack, tensor) in enumerate((s, t) for s in layout.raw_stacks for t in s.tensors)
    ]
    return NewBlock(block, buffers)


def chosen_by_auto(new: NewBlock) -> NewBlock:
    """The block as it is stored where the profile `auto` chose how it is encoded."""
    return replace(new, block=replace(new.block, origin=Origin(auto=True)))


def sequence(
    ns: Namespace, tokens: Sequence[int] | bytes, start: int = 0, fidelity: int = FIDELITY_EXACT
) -> list[NewBlock]:
    """Blocks and tail of a sequence, from the block that starts at `start` on."""
    packed = pack_tokens(tokens)
    parent, blocks = ns.root, []
    step = BLOCK_TOKENS * TOKEN_BYTES
    for at in range(0, len(packed), step):
        new = new_block(ns.root, parent, at // TOKEN_BYTES, packed[at : at + step], fidelity, ns.layout)
        parent = new.block.key
        if at // TOKEN_BYTES >= start:
            blocks.append(new)
    return blocks


def checkpoint(
    ns: Namespace, tokens: Sequence[int] | bytes, fidelity: int = FIDELITY_EXACT, n_floats: int = 6
) -> NewBlock:
    """The checkpoint after all of the tokens: of each exact layer one array, one of no bytes, one scalar."""
    packed = pack_tokens(tokens)
    keys = Chain(ns.root, packed).keys()
    start = len(keys) * BLOCK_TOKENS
    parent, tail = keys[-1] if keys else ns.root, packed[start * TOKEN_BYTES :]
    shapes = ((1, n_floats), (0, 4), ())
    arrays = tuple(StateArray(rule.name, rule.dtype, shape) for rule, shape in zip(ARRAYS, shapes, strict=True))
    states = tuple(LayerState(layer, (), arrays) for layer in ns.layout.exact_layers)
    key = checkpoint_key(parent, tail)
    block = Block(ns.root, parent, key, start, tail, fidelity, (), states=states)
    buffers = [
        state_values(key, layer, number, array)
        for layer in ns.layout.exact_layers
        for number, array in enumerate(arrays)
    ]
    return NewBlock(block, buffers)


def state_values(key: bytes, layer: int, number: int, array: StateArray) -> np.ndarray:
    """Bytes that only this array has; a boolean is 0 or 1."""
    return values(key + bytes([layer, number]), array.nbytes) & (1 if array.dtype == "BOOL" else 0xFF)


def options(**changes: Any) -> EngineOptions:
    """Options with room for everything, and nothing on disk but what is stored."""
    return EngineOptions(**{"budget_bytes": 1 << 30, "ballast_bytes": 0, **changes})


def put(engine: Engine, ns: Namespace, tokens: Sequence[int] | bytes, **details: Any) -> StoreReceipt:
    """Store a whole sequence."""
    return engine.store(ns.to_record(), sequence(ns, tokens, **details))


def put_checkpoint(engine: Engine, ns: Namespace, tokens: Sequence[int] | bytes, **details: Any) -> StoreReceipt:
    """Store the checkpoint after a sequence whose full blocks are there."""
    return engine.store(ns.to_record(), [checkpoint(ns, tokens, **details)])


def find(engine: Engine, ns: Namespace, tokens: Sequence[int] | bytes, **details: Any) -> Match:
    """Match a whole sequence, verifying that what it names is on disk and belongs to these tokens."""
    packed = pack_tokens(tokens)
    match = engine.match(Chain(ns.root, packed), **details)
    require_right(engine, match, packed)
    return match


def require_right(engine: Engine, match: Match, packed: bytes) -> None:
    """Every slice has the tokens asked for, and its file the values of its own tokens."""
    at = 0
    if match.checkpoint is not None:
        require_right_states(engine, match.checkpoint)
    with contextlib.closing(engine.reader(match.slices, open_max=4)) as reader:
        for number, part in enumerate(match.slices):
            width = part.take * TOKEN_BYTES
            assert part.row.tokens[:width] == packed[at : at + width]
            at += width
            info = engine.namespace(part.row.root)
            assert info is not None
            place = (part.row.root, part.row.parent, part.row.start, part.row.tokens)
            expected = new_block(*place, layout=info.layout).buffers
            for buffer, stack in zip(expected, part.row.block.runs[0].stacks, strict=True):
                got = bytearray(len(memoryview(buffer)))
                reader.readinto(number, stack.tensors[0].offset, [memoryview(got)])
                assert bytes(got) == bytes(memoryview(buffer))
    assert at == match.n_tokens * TOKEN_BYTES
    assert match.checkpoint is None or match.checkpoint.end == match.n_tokens


def require_right_states(engine: Engine, row: Row) -> None:
    """The file of a checkpoint has the bytes that belong to its key."""
    with contextlib.closing(engine.reader([Slice(row, row.n_tokens)])) as reader:
        for state in row.block.states:
            for number, array in enumerate(state.arrays):
                got = bytearray(array.nbytes)
                reader.readinto(0, array.offset, [memoryview(got)])
                assert bytes(got) == state_values(row.key, state.layer, number, array).tobytes()


def disk_usage(data_dir: Path) -> int:
    """What `du` says of the files, without lock, tag and folders."""
    return taken_bytes([data_dir.lstat(), *paths_below(data_dir).values()])


def blob_path(engine: Engine, row: Row) -> Path:
    """The file of a row's blob, encrypted or not."""
    return engine._shared.directory.root / "blobs.noindex" / row.root.hex() / row.blob.name


def blob_paths(data_dir: Path) -> set[Path]:
    """All files in the blob folders."""
    return set(paths_below(data_dir / "blobs.noindex", ".safetensors"))


def require_sound(engine: Engine) -> None:
    """No finding, every file has its row, and the counter is what the disk says."""
    assert engine.check().findings == []
    rows = engine.list_blocks(limit=1 << 30)
    root = engine._shared.directory.root
    assert blob_paths(root) == {blob_path(engine, info.row) for info in rows}
    assert engine.used_bytes == disk_usage(root)


class Stopped(BaseException):
    """The process is dead from here on."""


class RecordingFs(Fs):
    """Counts and names every call; at call number `at` does `strike`, which may raise. One call at a time."""

    def __init__(self, at: int = -1, strike: Callable[[], None] | None = None) -> None:
        self.calls: list[tuple[str, str]] = []
        self._at = at
        self._strike = strike
        self._paths: dict[int, str] = {}
        self._one = threading.RLock()
        self.dead = False

    @contextlib.contextmanager
    def _noted(self, name: str, what: object = "") -> Iterator[None]:
        with self._one:
            if self.dead:
                raise Stopped
            self.calls.append((name, os.path.basename(str(what))))
            if len(self.calls) - 1 == self._at and self._strike is not None:
                self._strike()
            yield

    def open(self, path: str, flags: int, mode: int) -> int:
        with self._noted("open", path):
            fd = super().open(path, flags, mode)
            self._paths[fd] = path
            return fd

    def write(self, fd: int, data: memoryview) -> int:
        with self._noted("write"):
            return super().write(fd, data[: len(data) // 2] if len(data) > 4096 else data)

    def fsync(self, fd: int) -> None:
        with self._noted("fsync", self._paths.get(fd, "")):
            super().fsync(fd)

    def rename(self, source: str, target: str) -> None:
        with self._noted("rename", target):
            super().rename(source, target)

    def unlink(self, path: str) -> None:
        with self._noted("unlink", path):
            super().unlink(path)

    def mkdir(self, path: str) -> None:
        with self._noted("mkdir", path):
            super().mkdir(path)

    def fsync_dir(self, path: str) -> None:
        with self._noted("fsync_dir", path):
            super().fsync_dir(path)

    def flush_drive(self, path: str) -> None:
        with self._noted("flush_drive", path):
            super().flush_drive(path)

    def commit(self, commit: Callable[[], None]) -> None:
        with self._noted("commit"):
            super().commit(commit)


class StoppingFs(RecordingFs):
    """Copies the data directory at call number `at`, as a machine would find it after SIGKILL, and is dead then."""

    def __init__(self, at: int, data_dir: Path, snapshot: Path) -> None:
        super().__init__(at, self._stop)
        self._data_dir = data_dir
        self._snapshot = snapshot

    def _stop(self) -> None:
        shutil.copytree(self._data_dir, self._snapshot)
        self.dead = True
        raise Stopped


def drop_children(engine: Engine) -> None:
    """Lose the index's entries of all children, as damage would."""
    with engine._shared.index.edit() as edit:
        edit._txn.drop(edit._db["children"], delete=False)
