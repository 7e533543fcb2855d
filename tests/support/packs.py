"""Packs for tests: a small one whose bytes follow from nothing but the code, and moving blobs between two engines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from kvstore.blobs.format import make_ready
from kvstore.blobs.pack_file import Manifest, pack_pieces
from kvstore.core.byte_budget import ByteBudget
from kvstore.engine import Engine, NewBlock
from kvstore.server.storing.importer import Imported, Importer
from tests.support.engine import HYBRID, checkpoint, namespace, sequence

Pieces = list[tuple[int, bytes]]
PACKED = namespace("packed", HYBRID)
TOKENS = list(range(300))
CREATED_S = 1_700_000_000


def blobs_of(blocks: Iterable[NewBlock], record: bytes) -> list[bytes]:
    """The files that blocks become."""
    found = []
    for new in blocks:
        block = replace(new.block, namespace=record, created_s=CREATED_S)
        ready = make_ready(block, new.buffers)
        found.append(ready.header + b"".join(map(bytes, ready.payload)))
    return found


def pieces_of(blobs: Iterable[bytes], size: int = 1 << 20) -> Pieces:
    """Blobs cut into pieces."""
    return [(0 if at else len(blob), blob[at : at + size]) for blob in blobs for at in range(0, len(blob), size)]


def small_pack() -> bytes:
    """A full block, a tail and the checkpoint at its end."""
    blobs = blobs_of([*sequence(PACKED, TOKENS), checkpoint(PACKED, TOKENS)], PACKED.to_record())
    manifest = Manifest(PACKED.info, len(blobs), sum(map(len, blobs)), CREATED_S, "0.1.0")
    return b"".join(map(bytes, pack_pieces(manifest, pieces_of(blobs))))


def write_small_pack(path: Path) -> Path:
    """The small pack as a file."""
    path.write_bytes(small_pack())
    return path


def shipped(engine: Engine, namespace_prefix: bytes = b"", key_prefix: bytes = b"") -> Pieces:
    """All that an export hands over."""
    return list(engine.transfer.pieces(engine.transfer.plan(namespace_prefix, key_prefix)))


def importer_of(engine: Engine, memory_bytes: int = 64 << 20) -> Importer:
    """An import into an engine, of what the engine encrypts only if it is encrypted there already."""
    return Importer(
        engine, lambda root: engine.encrypt(root) if engine.is_encrypted(root) else None, ByteBudget(memory_bytes)
    )


def take_in(engine: Engine, pieces: Iterable[tuple[int, bytes]], memory_bytes: int = 64 << 20) -> Imported:
    """Import pieces, and let go of the memory whatever happens."""
    importer = importer_of(engine, memory_bytes)
    try:
        for blob_bytes, data in pieces:
            if not importer.take(blob_bytes, data):
                break
        return importer.finish()
    finally:
        importer.close()
        assert importer._buffers.used_bytes == 0
