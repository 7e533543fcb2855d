"""Uploads under way: what was asked of a worker, who depends on whom, and what happens to those that die."""

from __future__ import annotations

import copy
import logging
import secrets
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvstore.codecs.profiles import Profile
from kvstore.core.blocks import BLOCK_TOKENS, LayerState
from kvstore.core.keys import Chain, NamespaceInfo
from kvstore.core.layers import Layout, Piece
from kvstore.engine import NamespaceKey, Slice
from kvstore.errors import KVStoreError, LimitError, NotFoundError
from kvstore.server.storing.intake import Intake

log = logging.getLogger(__name__)

RETRY_S = 1.0
# The reason of this many failed uploads is kept until their workers ask for it.
FAILED_MAX = 256


class Shares:
    """Bytes under way, in all and by caller. Any thread may call.

    A single item may take the whole limit. Several items of one caller stay within its share, so that its uncommitted
    bytes displace only that much of what others have.
    """

    def __init__(self, limit_bytes: Callable[[], int], callers: int) -> None:
        """`limit_bytes` of all is asked each time: it follows the budget. One caller's share is 1/`callers` of it."""
        self._limit_bytes = limit_bytes
        self._callers = callers
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()

    def try_acquire(self, caller: str, nbytes: int) -> int | None:
        """Count bytes: None; or the limit in bytes that leaves no room for them, of all or of this caller."""
        limit = self._limit_bytes()
        with self._lock:
            held = self._held[caller]
            if held and held + nbytes > limit // self._callers:
                return limit // self._callers
            if self._held.total() + nbytes > limit:
                return limit
            self._held[caller] = held + nbytes
            return None

    def release(self, caller: str, nbytes: int) -> None:
        """Give back `nbytes` that the caller held."""
        with self._lock:
            self._held[caller] -= nbytes
            self._held = +self._held


@dataclass
class Upload:
    """One store between BeginStore and its end. The thread that carries it out owns it; the table only lists it."""

    namespace: NamespaceInfo
    namespace_record: bytes
    chain: Chain
    keys: tuple[bytes, ...]  # of all blocks of the sequence, the tail's last
    profile: Profile
    profile_named: bool
    auto: bool  # the profile `auto` chose it, and
    smallest: bool  # it is the smallest that is allowed
    restored_fidelity: int
    first_block: int  # index of the first block to be written
    spliced: tuple[Slice, ...]  # at most one: a stored block whose leading tokens the first block starts with
    pieces: tuple[Piece, ...]  # what the worker hands over, in order
    states: tuple[LayerState, ...] = ()  # of the checkpoint after the last token, handed over after the pieces
    depends_on: tuple[str, ...] = ()
    interim: bool = False  # the checkpoint is one within a prompt that is still being computed
    awaits_checkpoint: bool = (
        False  # another upload, which this one depends on, sends the checkpoint after the last token
    )
    # The key with which it is written and committed; None: not encrypted.
    encryption: NamespaceKey | None = None
    evictions: int = 0  # of the engine when it began: a later one of what it brings takes it along
    upload_id: str = field(default_factory=lambda: secrets.token_hex(16))
    committing: bool = False
    release: Callable[[], None] = lambda: None  # gives back lease and accounted bytes
    intake: Intake = field(init=False)

    def __post_init__(self) -> None:
        self.intake = Intake(self.upload_bytes)

    @property
    def encrypted(self) -> bool:
        """Whether the namespace is."""
        return self.encryption is not None

    @property
    def layout(self) -> Layout:
        """The namespace's layout."""
        return self.namespace.layout

    @property
    def fidelity(self) -> int:
        """Upper bound on the fidelity of what this upload stores."""
        return min(self.profile.fidelity, self.restored_fidelity)

    @property
    def n_tokens(self) -> int:
        """Tokens of the whole sequence."""
        return self.chain.n_tokens

    @property
    def new_keys(self) -> tuple[bytes, ...]:
        """Keys of what this upload will write."""
        blocks = self.keys[self.first_block :]
        return (*blocks, self.chain.checkpoint_key()) if self.states else blocks

    @property
    def start(self) -> int:
        """First token that the worker hands over."""
        return self.pieces[0].start if self.pieces else self.n_tokens

    @property
    def upload_bytes(self) -> int:
        """Exact bytes that the worker hands over."""
        return self.pieces_bytes + sum(state.nbytes for state in self.states)

    @property
    def pieces_bytes(self) -> int:
        """The tokens' part of them."""
        return sum(piece.n_tokens for piece in self.pieces) * self.layout.token_bytes

    @property
    def wants_bytes(self) -> bool:
        """Whether the worker has anything to hand over, be it of no bytes."""
        return bool(self.pieces or self.states)

    def alive(self, idle_s: float, bytes_per_s_min: int) -> bool:
        """Whether its worker sent anything within `idle_s`, and fast enough in all; when it commits, it always is."""
        in_time = self.intake.waited_s <= idle_s + self.upload_bytes / bytes_per_s_min
        return self.committing or (in_time and self.intake.idle_s <= idle_s)


class Uploads:
    """The table of uploads, at most `uploads_max`. Thread-safe; its lock is never held over I/O.

    All but what ends an upload may be called on the event loop. The files of one that ends are unlinked by its thread.
    """

    def __init__(self, uploads_max: int) -> None:
        self._uploads_max = uploads_max
        self._lock = threading.Lock()
        self._by_id: dict[str, Upload] = {}
        self._by_key: dict[bytes, str] = {}
        self._failed: OrderedDict[str, KVStoreError] = OrderedDict()

    def add(self, upload: Upload) -> None:
        """List the upload; LimitError when too many are under way."""
        with self._lock:
            if len(self._by_id) >= self._uploads_max:
                raise LimitError(f"{self._uploads_max} uploads are under way; try again later", RETRY_S, "uploads_max")
            self._by_id[upload.upload_id] = upload
            for key in upload.new_keys:
                self._by_key.setdefault(key, upload.upload_id)

    def get(self, upload_id: str) -> Upload:
        """The upload; NotFoundError when it ended, was given up, or never was. One that failed raises why, once."""
        with self._lock:
            upload, failed = self._by_id.get(upload_id), self._failed.pop(upload_id, None)
        if failed is not None:
            raise failed
        if upload is None:
            raise NotFoundError("no such upload: it ended, was given up as idle, or belongs to an earlier daemon")
        return upload

    def claim(self, upload_id: str) -> Upload:
        """The upload, marked as committing; a second claim is a NotFoundError. Raises as `get`."""
        upload = self.get(upload_id)
        with self._lock:
            if upload.committing or upload_id not in self._by_id:
                raise NotFoundError("the upload is being committed already, or was given up")
            upload.committing = True
        return upload

    def fail(self, upload: Upload, error: KVStoreError) -> None:
        """The upload's thread could not carry it out: end it, and keep the reason if its worker has yet to ask."""
        with self._lock:
            listed = self._unlist(upload)
            if listed and not upload.committing:
                self._failed[upload.upload_id] = copy.copy(error)  # without its frames, which hold the upload's memory
                while len(self._failed) > FAILED_MAX:
                    self._failed.popitem(last=False)
        if listed:
            upload.release()

    def receiving(self, keys: tuple[bytes, ...], first: int, fidelity_min: int) -> tuple[int, tuple[str, ...]]:
        """What other uploads already send, from block `first` on: (first block that none of them sends, upload ids)."""
        ids: list[str] = []
        with self._lock:
            while first < len(keys) and (upload_id := self._by_key.get(keys[first])) is not None:
                if self._by_id[upload_id].fidelity < fidelity_min:
                    break
                if upload_id not in ids:
                    ids.append(upload_id)
                first += 1
        return first, tuple(ids)

    def sender_of(self, key: bytes, fidelity_min: int) -> str | None:
        """Id of the upload that sends the block of this key with at least `fidelity_min`; None if there is none."""
        with self._lock:
            upload_id = self._by_key.get(key)
            return upload_id if upload_id and self._by_id[upload_id].fidelity >= fidelity_min else None

    def under_way(self) -> list[Upload]:
        """All uploads that are listed now."""
        with self._lock:
            return list(self._by_id.values())

    def any_listed(self, upload_ids: Sequence[str]) -> bool:
        """Whether any of those uploads is still under way."""
        with self._lock:
            return any(upload_id in self._by_id for upload_id in upload_ids)

    def give_up(self, upload: Upload, error: KVStoreError | None = None) -> bool:
        """End the upload, and free all that it held, unless its commit has begun: then it is the commit's.

        Its thread is told, and drops what it wrote. Whether it was under way.
        """
        if given_up := self._give_up(upload, error):
            upload.release()
        return given_up

    def _give_up(self, upload: Upload, error: KVStoreError | None = None) -> bool:
        with self._lock:
            given_up = not upload.committing and self._by_id.get(upload.upload_id) is upload and self._unlist(upload)
        if given_up:
            upload.intake.give_up(error)
        return given_up

    def _unlist(self, upload: Upload) -> bool:
        """Off the table; whether it was on it. Hold the lock."""
        for key in upload.new_keys:
            if self._by_key.get(key) == upload.upload_id:
                del self._by_key[key]
        return self._by_id.pop(upload.upload_id, None) is not None

    def end(self, upload: Upload) -> None:
        """Take the upload off the table and free all that it held. Safe to call twice."""
        with self._lock:
            listed = self._unlist(upload)
        if listed:
            upload.release()

    def reap(self, idle_s: float, bytes_per_s_min: int = 1) -> list[Upload]:
        """Give up uploads whose worker was silent for `idle_s`, or not fast enough. The caller releases them."""
        idle = [upload for upload in self.under_way() if not upload.alive(idle_s, bytes_per_s_min)]
        return [upload for upload in idle if self._give_up(upload)]

    def end_all(self) -> None:
        """Give up everything, at shutdown. A commit that is still running ends its upload itself."""
        for upload in self.under_way():
            self.give_up(upload)


def block_range(index: int, n_tokens: int) -> tuple[int, int]:
    """Token range of block `index` in a sequence of `n_tokens`."""
    return index * BLOCK_TOKENS, min((index + 1) * BLOCK_TOKENS, n_tokens)
