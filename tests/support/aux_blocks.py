"""Blocks that refer to an aux block: raw, under recipes with references, so that no codec takes part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvstore.blobs.format import aux_block
from kvstore.core.blocks import RAW, Block
from kvstore.core.keys import Namespace, aux_key
from kvstore.engine import Engine, NewBlock, StoreReceipt
from kvstore.errors import AuxMissingError
from tests.support.engine import sequence


def basis_of(number: int, nbytes: int = 5000) -> bytes:
    """Bytes that only this basis has."""
    period = bytes((number + at) % 251 for at in range(251))
    return (period * (nbytes // 251 + 1))[:nbytes]


def new_aux(ns: Namespace, data: bytes) -> NewBlock:
    """An aux block to be stored."""
    return NewBlock(aux_block(ns.root, data), [data])


def put_aux(engine: Engine, ns: Namespace, data: bytes) -> StoreReceipt:
    """Store an aux block alone, as a calibration does."""
    return engine.store(ns.to_record(), [new_aux(ns, data)])


def referring(new: NewBlock, *digests: bytes) -> NewBlock:
    """The block with these references in the recipes of its keys."""
    recipe = replace(RAW, references=digests)
    runs = tuple(
        replace(run, stacks=tuple(replace(s, recipe=recipe) if s.part == "keys" else s for s in run.stacks))
        for run in new.block.runs
    )
    return NewBlock(replace(new.block, runs=runs), new.buffers)


def put_referring(
    engine: Engine, ns: Namespace, tokens: Sequence[int], *digests: bytes, start: int = 0
) -> StoreReceipt:
    """Store a sequence whose blocks from `start` on refer to these aux blocks."""
    return engine.store(ns.to_record(), [referring(new, *digests) for new in sequence(ns, tokens, start)])


def counted(engine: Engine, root: bytes) -> dict[bytes, int]:
    """How many blocks of a namespace refer to each aux block, by reading every row."""
    found: dict[bytes, int] = {}
    for info in engine.list_blocks(root, limit=1 << 30):
        block: Block = info.row.block
        for digest in block.references:
            found[digest] = found.get(digest, 0) + 1
    return found


def read_aux(engine: Engine, root: bytes, digest: bytes) -> bytes | None:
    """The bytes of an aux block; None when it is not there."""
    try:
        return engine.aux(root, [digest])[digest]
    except AuxMissingError:
        return None


@dataclass(frozen=True, slots=True)
class AuxInfo:
    """An aux block: its digest, its bytes (0: lost), its bytes on disk, and how many blocks refer to it."""

    digest: bytes
    nbytes: int
    disk_bytes: int
    blocks: int


def list_aux(engine: Engine, root: bytes) -> list[AuxInfo]:
    """The aux blocks of a namespace as the index has them, lost ones too."""
    site = engine._shared.site
    with site.index.view() as view:
        rows = list(view.aux(root))
    count = site.index.table.value
    return [
        AuxInfo(
            row.block.aux.digest,
            0 if row.is_lost else row.block.aux.nbytes,
            site.cost(row),
            count(row.key, "children"),
        )
        for row in rows
        if not row.is_key_missing and row.block.aux is not None
    ]


def row_number(engine: Engine, root: bytes, digest: bytes) -> int:
    """How many blocks refer to an aux block, as the index has it; -1 without a row."""
    key = aux_key(root, digest)
    return engine._shared.index.table.value(key, "children") if key in engine._shared.index.table else -1
