"""Builds a large index without blobs, for benches of match: its time depends only on the rows.

Rows are written through the engine's own index, in the order in which stores would write them. Real stores of this many
blocks would take hours, because each request writes files, syncs and commits.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvstore.blobs.fs import Fs
from kvstore.blobs.keyring import KeyRing
from kvstore.blobs.protocol import disk_bytes
from kvstore.core.blocks import BLOCK_TOKENS, FIDELITY_EXACT, TOKEN_BYTES, Block, Run, Stack
from kvstore.core.keys import Namespace, block_key
from kvstore.engine.adopt import NEXT_NUMBER
from kvstore.engine.directory import claim
from kvstore.index.index import REBUILDING, Index
from kvstore.index.rows import Row, pack_row
from kvstore.index.validate import digest

# Rows of one write transaction.
COMMIT_ROWS = 20_000
VOCABULARY = 150_000


def sequence_tokens(number: int, n_tokens: int) -> bytes:
    """Packed tokens of sequence `number`, the same every time."""
    rng = np.random.default_rng(number)
    return rng.integers(0, VOCABULARY, n_tokens, "<i8").tobytes()


def load_rows(data_dir: Path, namespace: Namespace, n_rows: int, sequence_blocks: int) -> int:
    """Make a data directory whose index has `n_rows` rows, in sequences of `sequence_blocks` full blocks each.

    Returns how many sequences are there in whole. The directory is left as after a clean stop. It must be new.
    """
    directory, hold = claim(data_dir)
    with hold:
        index = Index(directory.index, Fs(), KeyRing(directory.keys, Fs()), sync=False)
        rows = _rows(namespace, n_rows, sequence_blocks)
        try:
            for batch in iter(lambda: list(itertools.islice(rows, COMMIT_ROWS)), []):
                with index.edit() as edit:
                    edit.put_namespace(namespace.root, namespace.to_record(), int(time.time()))
                    for row in batch:
                        edit.put(row, disk_bytes(row.blob_bytes))
                    edit.set_meta(NEXT_NUMBER, batch[-1].number + 1)
                    edit.set_meta(REBUILDING, 0)
            index.sync()
        finally:
            index.close()
    call_clean(data_dir)
    return n_rows // sequence_blocks


def call_clean(data_dir: Path) -> None:
    """Have the next start take the index as it is. A stop finds it out of step: the blobs were never there."""
    directory, hold = claim(data_dir)
    with hold:
        hold.write(clean=True, durability="commit", index=digest(directory.index / "data.mdb"))


def _rows(namespace: Namespace, n_rows: int, sequence_blocks: int) -> Iterator[Row]:
    run = _run(namespace)
    step = BLOCK_TOKENS * TOKEN_BYTES
    for sequence in itertools.count():
        tokens = sequence_tokens(sequence, sequence_blocks * BLOCK_TOKENS)
        parent = namespace.root
        for number in range(sequence_blocks):
            seq = sequence * sequence_blocks + number + 1
            if seq > n_rows:
                return
            chunk = tokens[number * step : (number + 1) * step]
            key = block_key(parent, chunk)
            block = Block(namespace.root, parent, key, number * BLOCK_TOKENS, chunk, FIDELITY_EXACT, (run,), seq)
            yield pack_row(block, seq, 4096, 4096 + run.nbytes())
            parent = key


def _run(namespace: Namespace) -> Run:
    """A whole raw block of the layout, with room for checksums as a complete one has."""

    def summed(stack: Stack) -> Stack:
        size = 8 * len(stack.layers)
        return replace(stack, tensors=tuple(replace(tensor, checksums=bytes(size)) for tensor in stack.tensors))

    stacks = tuple(summed(stack) for stack in namespace.layout.raw_stacks)
    return Run(BLOCK_TOKENS, 0, BLOCK_TOKENS, FIDELITY_EXACT, stacks)
