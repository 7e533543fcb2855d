"""The durable store: blob files and the LMDB index that names them. Synchronous, one writer, any thread may read."""

from kvstore.blobs.fs import Fs
from kvstore.blobs.keyring import NamespaceKey
from kvstore.engine.check import CheckReport, Finding
from kvstore.engine.deletions import Lease
from kvstore.engine.directory import device_of, require_store
from kvstore.engine.engine import Engine
from kvstore.engine.evict import EvictReport, Selection
from kvstore.engine.keep import Terms
from kvstore.engine.listing import BlockInfo, EngineStats, NamespaceUsage, StoredSequence
from kvstore.engine.match import Match, Slice
from kvstore.engine.recover import check_directory
from kvstore.engine.reencode import Reencoded
from kvstore.engine.shared import EngineOptions
from kvstore.engine.store import NewBlock, StoreReceipt
from kvstore.index.rows import Row

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
    "Reencoded",
    "Row",
    "Selection",
    "Slice",
    "StoreReceipt",
    "StoredSequence",
    "Terms",
    "check_directory",
    "device_of",
    "require_store",
]
