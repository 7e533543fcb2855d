"""Blobs of short sequences as a remote store holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvstore.blobs.format import make_ready
from kvstore.core.blocks import FIDELITY_EXACT, Block, pack_tokens
from kvstore.core.keys import Chain, Namespace
from kvstore.remote.object_names import Naming, label_of
from tests.support.engine import checkpoint, namespace, sequence
from tests.support.memory_objects import MemoryStore

NS = namespace()


def blobs_of(
    n_tokens: int, ns: Namespace = NS, first: int = 0, fidelity: int = FIDELITY_EXACT, mark: bool = False
) -> list[tuple[Block, bytes]]:
    """Blocks and tail of a sequence, and the checkpoint at its end if wanted, each with its blob."""
    tokens = range(first, first + n_tokens)
    made = sequence(ns, tokens, fidelity=fidelity) + ([checkpoint(ns, tokens, fidelity)] if mark else [])
    blobs = []
    for new in made:
        ready = make_ready(replace(new.block, namespace=ns.to_record()), new.buffers)
        blobs.append((ready.block, ready.header + b"".join(ready.payload)))
    return blobs


def chain_of(tokens: Sequence[int], ns: Namespace = NS) -> Chain:
    """A prompt."""
    return Chain(ns.root, pack_tokens(tokens))


def name_of(block: Block, ns: Namespace = NS) -> str:
    """The name of its object."""
    return Naming(ns.info).name(block.parent, block.key, label_of(block.fidelity))


def fill(store: MemoryStore, blobs: Sequence[tuple[Block, bytes]], ns: Namespace = NS) -> None:
    """Put blobs under their names."""
    for block, blob in blobs:
        store.put(name_of(block, ns), blob)
