"""The durable store: blob files and the LMDB index that names them. Synchronous, one writer, any thread may read."""

from kvstore.blobs.fs import Fs
from kvstore.engine.deletions import Lease
from kvstore.engine.directory import device_of, require_store
from kvstore.engine.engine import Engine
from kvstore.engine.keyring import NamespaceKey
from kvstore.engine.recover import check_directory
from kvstore.engine.rows import Row
from kvstore.engine.sequences import StoredSequence
from kvstore.engine.types import (
    BlockInfo,
    CheckReport,
    EngineOptions,
    EngineStats,
    EvictReport,
    Finding,
    Match,
    NamespaceUsage,
    NewBlock,
    Selection,
    Slice,
    StoreReceipt,
)

__all__ = [
    "BlockInfo",
    "CheckReport",
    "Engine",
    "EngineOptions",
    "EngineStats",
    "EvictReport",
    "Finding",
    "Fs",
    "Lease",
    "Match",
    "NamespaceKey",
    "NamespaceUsage",
    "NewBlock",
    "Row",
    "Selection",
    "Slice",
    "StoreReceipt",
    "StoredSequence",
    "check_directory",
    "device_of",
    "require_store",
]
