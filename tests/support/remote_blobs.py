"""Blobs of short sequences as a remote store holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvstore.blobs.format import make_ready
from kvstore.core.blocks import FIDELITY_EXACT, Block, pack_tokens
from kvstore.core.breaker import Deadline
from kvstore.core.keys import Chain, Namespace
from kvstore.errors import DeadlineError, KVStoreError, RemoteError
from kvstore.remote.object_names import Naming, label_of
from kvstore.remote.object_store import Wanted, whole
from kvstore.remote.objects import parse_blob, require_block
from kvstore.remote.tier import RemoteTier
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


def found(
    tier: RemoteTier,
    n_tokens: int,
    limit_s: float,
    ns: Namespace = NS,
    labels: Sequence[str] = ("exact",),
    fidelity_min: int = FIDELITY_EXACT,
    find_s: float | None = None,
) -> list[bytes]:
    """The blobs of a prompt, whole and verified, up to the first that cannot be had; none where the store fails.

    `find_s`: the limit of finding them; None: that of reading.
    """
    deadline = Deadline(limit_s if find_s is None else find_s)
    try:
        reach = tier.finder.find(chain_of(range(n_tokens), ns), Naming(ns.info), labels, deadline)
        wanted = [Wanted(one.name, one.head.etag, whole(one.head)) for one in reach.blocks]
        answers = tier.store.read_all(wanted, Deadline(limit_s))
    except (RemoteError, DeadlineError):
        return []
    blobs: list[bytes] = []
    for one, answer in zip(reach.blocks, answers, strict=True):
        if isinstance(answer, KVStoreError):
            break
        data = answer[0] if answer else memoryview(b"")
        try:
            require_block(parse_blob(data), one, fidelity_min)
        except KVStoreError as error:
            tier.finder.report_wrong(one, error)
            break
        blobs.append(bytes(data))
    return blobs
