"""What goes into the engine and comes out of it. Frozen values, no behaviour."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.blobs.format import Buffer
from kvstore.core.blocks import FIDELITY_EXACT, Block, Reason
from kvstore.core.keys import NamespaceInfo
from kvstore.core.layers import Layout
from kvstore.core.rules import check_block
from kvstore.engine.index import MAP_BYTES
from kvstore.engine.rows import Row, Taken, Templates, fidelities_of, parse_row
from kvstore.errors import ConfigError

# `none`, without any sync, is for tests: the configuration does not offer it.
DURABILITIES = ("commit", "full", "none")
# A namespace that no caller named for so long is an orphan: its model, adapter or engine has changed since, or is gone.
ORPHAN_S = 30 * 86_400


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the engine is to run.

    `budget_bytes` bounds what the data directory costs on disk; under `free_floor_bytes` of free disk nothing is
    written. `socket` is told to a second daemon that wants the same directory. `evicted_max` keys are remembered, so
    that a miss can say why. Along one chain stay `checkpoints_max` checkpoints, and all of them together take at most
    `checkpoint_share_percent` of the budget. `ballast_bytes` (at most 1/64 of it) are kept on disk, to be given up when
    the disk is full. `master_key` (32 bytes, or none) opens the keys of encrypted namespaces, which
    lie in `keys_dir` (None: beside the data directory), never in the data directory.
    A tail that ends before `short_tokens` gives way to any longer block, others to those of no lower fidelity.
    `rule` raises CorruptDataError for a block that no engine could go on from, see `kvstore.core.rules`.
    A pass of the scrub reads every blob again at `scrub_bytes_per_s` (0: never), `scrub_interval_s` after the last one.
    """

    budget_bytes: int
    free_floor_bytes: int = 0
    durability: str = "commit"
    map_bytes: int = MAP_BYTES
    socket: str = ""
    touches_max: int = 4096
    touches_age_s: float = 30.0
    evicted_max: int = 65_536
    quarantine_files_max: int = 64
    checkpoints_max: int = 8
    checkpoint_share_percent: int = 20
    ballast_bytes: int = 1 << 20
    short_tokens: int = 0
    scrub_bytes_per_s: int = 0
    scrub_interval_s: float = 7 * 86_400.0
    master_key: bytes = field(default=b"", repr=False)
    rule: Callable[[Layout, Block], None] = field(default=check_block, repr=False)
    keys_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.durability not in DURABILITIES:
            raise ConfigError(f"durability must be one of {', '.join(DURABILITIES)}, not {self.durability!r}")
        if self.budget_bytes < 0 or self.free_floor_bytes < 0:
            raise ConfigError("budget_bytes and free_floor_bytes cannot be negative")
        if self.checkpoints_max < 1 or not 0 <= self.checkpoint_share_percent <= 100:
            raise ConfigError("checkpoints_max must be 1 or more, checkpoint_share_percent 0 to 100")

    @property
    def checkpoint_share_bytes(self) -> int:
        """What all checkpoints together may cost on disk."""
        return self.budget_bytes * self.checkpoint_share_percent // 100


@dataclass(frozen=True, slots=True)
class Slice:
    """The first `take` tokens of a stored block."""

    row: Row
    take: int


@dataclass(frozen=True)
class Match:
    """The longest usable prefix: its blocks in order, and why there is no more.

    Of an exact match also the checkpoint at its end, if there is one. `diverged`: what is stored goes on after it,
    differently from what was asked for (`Engine.mark_divergence`). The rows are parsed when somebody looks into them,
    which may raise what `parse_row` does.
    """

    n_tokens: int
    reason: Reason
    rows: tuple[Taken, ...] = ()
    checkpoint: Row | None = None
    diverged: bool = False
    templates: Templates = field(default_factory=dict, repr=False)

    @functools.cached_property
    def slices(self) -> tuple[Slice, ...]:
        """The blocks in order."""
        return tuple([Slice(parse_row(key, value, self.templates), take) for key, value, take in self.rows])

    @functools.cached_property
    def fidelity(self) -> int:
        """The least rank among blocks and checkpoint."""
        own = FIDELITY_EXACT if self.checkpoint is None else self.checkpoint.fidelity
        return min([own, *fidelities_of(self.rows)])

    @property
    def parts(self) -> tuple[Slice, ...]:
        """Everything to be read: the slices, and, as one more, the checkpoint."""
        row = self.checkpoint
        return self.slices if row is None else (*self.slices, Slice(row, row.n_tokens))


@dataclass
class NewBlock:
    """A block to be stored. Its tensors carry no offsets or checksums yet; `buffers` holds one for each tensor.

    Order: runs, stacks, tensors; each C-contiguous `[layers, heads, tokens, width]`. Of a checkpoint: one for each
    state array, also the empty ones, in the order of layers and arrays.
    """

    block: Block
    buffers: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class StoreReceipt:
    """How many of the blocks given, counted from the first, are in the store now, and what they newly cost on disk."""

    blocks: int
    new_bytes: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Selection:
    """What to evict. Filters are ANDed; an empty selection is an error unless `all`. `bytes`: stop after so many.

    `key_prefix` takes the blocks whose key starts so, and everything after them. `idle_s`: not used for so long.
    `orphans`: namespaces that no caller named for ORPHAN_S.
    """

    namespace_prefix: bytes = b""
    key_prefix: bytes = b""
    idle_s: float = 0
    bytes: int = 0
    orphans: bool = False
    all: bool = False


@dataclass(frozen=True, slots=True)
class EvictReport:
    """What was removed, or would be: blocks, checkpoints among them, and bytes on disk.

    `kept_bytes` are deleted, too, but still on the disk: readers have the files open, or the disk did not let them go.
    """

    blocks: int
    freed_bytes: int
    kept_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong in a data directory. Kinds: missing_blob, stray_blob, corrupt_blob, missing_parent, size, row,
    unknown_format."""

    kind: str
    path: str
    detail: str


@dataclass
class CheckReport:
    """What a check read (blobs, bytes), what it put right, and what it found, the first FINDINGS_MAX."""

    blobs: int = 0
    bytes: int = 0
    repaired: int = 0
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """A row, what its blob costs on disk, when it was last used, and where it lies."""

    row: Row
    nbytes: int
    accessed_s: int
    path: str


@dataclass(frozen=True, slots=True)
class NamespaceUsage:
    """What one namespace holds. `blocks` and `tokens` do not count checkpoints; `disk_bytes` does.

    `used_s`: when a caller last named it, by wall clock; `orphaned`: that was more than ORPHAN_S ago.
    """

    info: NamespaceInfo
    blocks: int
    tokens: int
    disk_bytes: int
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    encrypted: bool = False
    used_s: int = 0
    orphaned: bool = False

    @property
    def logical_bytes(self) -> int:
        """Raw size of the tokens held."""
        return self.tokens * self.info.layout.token_bytes


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts of now and since the engine was opened. Sizes are bytes on disk.

    `used_bytes` = `stored_bytes` (blobs) + `pending_bytes` (being written) + index + quarantine + keys.
    `blobs` are blocks and checkpoints; `stored_bytes` includes `checkpoint_bytes`, at most `checkpoint_share_bytes`.
    `evictions` are (blocks, bytes on disk) deleted since the start, by cause (`kvstore.engine.deletions`).
    `degraded` says why nothing is written at present; empty when all is well. `scrubbed_s` is when the last full pass
    of the scrub ended, seconds since 1970, 0 if never; `damaged` counts blobs that it moved to quarantine since then.
    """

    used_bytes: int
    budget_bytes: int
    free_bytes: int
    free_floor_bytes: int
    blobs: int
    stored_bytes: int
    pending_bytes: int
    index_bytes: int
    quarantine_bytes: int
    quarantined: int
    written_bytes: int
    evictions: dict[str, tuple[int, int]]
    degraded: str
    namespaces: tuple[NamespaceUsage, ...]
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    checkpoint_share_bytes: int = 0
    scrubbed_s: int = 0
    damaged: int = 0

    @property
    def evicted_blocks(self) -> int:
        """Blocks deleted since the start, whatever the cause."""
        return sum(blocks for blocks, _ in self.evictions.values())
