"""Blobs out of the remote store. What it holds is believed no more than what a stranger sends.

An object is a blob as `kvstore.blobs.format` describes it, never encrypted. Its name promises a block; the header must
be that of the block, and every byte must have its checksum. Anything else is CorruptDataError, and is never served.
"""

from __future__ import annotations

from dataclasses import replace

from kvstore.blobs import format as blob_format
from kvstore.core.blocks import BLOCK_TOKENS, TOKEN_BYTES, Block, common_tokens, count_tokens
from kvstore.core.breaker import Deadline
from kvstore.core.keys import Chain, NamespaceInfo
from kvstore.core.rules import check_block
from kvstore.errors import CorruptDataError, DeadlineError, KVStoreError, RemoteError
from kvstore.remote.finder import Reach, RemoteBlock
from kvstore.remote.object_names import Naming, label_of
from kvstore.remote.object_store import ByteRange, ObjectStore, Wanted

# Read of every blob to have its header at once. A block of 64 layers has one of some 20 KB: two checksums a layer in
# base64, its tokens, the record of its namespace.
HEADER_GUESS_BYTES = 64 << 10
# Of a block that goes on differently fewer tokens are not worth it: they are computed in the time that asking may take.
SHARED_TOKENS_MIN = 128


def read_header(store: ObjectStore, wanted: RemoteBlock, deadline: Deadline) -> Block:
    """The block that the header of an object describes: one read, a second for a header over HEADER_GUESS_BYTES.

    Blocks the calling thread. RemoteError, DeadlineError when the store does not answer, ObjectChangedError when the
    object is another one by now; the errors of `parse_blob` when it is no blob.
    """

    def first(nbytes: int) -> bytes:
        if not nbytes:
            return b""
        (data,) = store.read(wanted.name, wanted.head.etag, [ByteRange(0, nbytes)], deadline)
        return bytes(data)

    head = first(min(HEADER_GUESS_BYTES, wanted.head.nbytes))
    length = blob_format.header_length(head[: blob_format.LENGTH_BYTES], wanted.head.nbytes)
    head = head[:length] if length <= len(head) else first(length)
    return blob_format.parse_header(head, wanted.head.nbytes)


def extended(store: ObjectStore, reach: Reach, chain: Chain, naming: Naming, deadline: Deadline) -> Reach:
    """A reach with the block that has most of the prompt's next tokens before it goes on differently.

    One round trip for the headers of `reach.others`. Only where that may give SHARED_TOKENS_MIN tokens more. What
    cannot be read or is no such block is passed over; nothing is raised of it.
    """
    start = reach.full * BLOCK_TOKENS
    rest = chain.tokens[start * TOKEN_BYTES : (start + BLOCK_TOKENS) * TOKEN_BYTES]
    least = reach.n_tokens + SHARED_TOKENS_MIN
    if not reach.others or start + count_tokens(rest) < least or deadline.left_s <= 0:
        return reach
    wanted = [
        Wanted(one.name, one.head.etag, [ByteRange(0, min(HEADER_GUESS_BYTES, one.head.nbytes))])
        for one in reach.others
    ]
    try:
        answers = store.read_all(wanted, deadline)
    except (RemoteError, DeadlineError):
        return reach
    parent = chain.parent(reach.full)
    found = []
    for one, answer in zip(reach.others, answers, strict=True):
        block = None if isinstance(answer, KVStoreError) else _parsed(bytes(answer[0]), one.head.nbytes)
        if block is None or block.is_checkpoint or block.root != chain.root:
            continue
        label = label_of(block.fidelity)
        shared = common_tokens(block.tokens, rest)
        if start + shared >= least and block.start == start and naming.name(parent, block.key, label) == one.name:
            values = one.name, one.head, label, block.root, parent, block.key, block.tokens, start
            found.append(RemoteBlock(*values, shared=shared))
    if not found:
        return reach
    best = max(found, key=lambda one: one.end)
    blocks = tuple(one for one in reach.blocks if one.end <= start)  # a shorter tail of the prompt's own is in it
    return replace(reach, blocks=(*blocks, best))


def _parsed(head: bytes, nbytes: int) -> Block | None:
    """The block of a blob's first bytes; None when they do not hold its whole header, or it is none."""
    try:
        length = blob_format.header_length(head[: blob_format.LENGTH_BYTES], nbytes)
        return blob_format.parse_header(head[:length], nbytes) if length <= len(head) else None
    except KVStoreError:
        return None


def require_block(block: Block, wanted: RemoteBlock, fidelity_min: int) -> Block:
    """The block of a header; CorruptDataError unless it is the one that was looked for, at this rank or a higher."""
    if (block.root, block.parent, block.key) != (wanted.root, wanted.parent, wanted.key):
        raise CorruptDataError(f"{wanted.name} holds another block than its name says")
    if block.tokens != wanted.tokens or block.start != wanted.start or block.is_checkpoint != wanted.is_checkpoint:
        raise CorruptDataError(f"{wanted.name} holds other tokens than its name says")
    if block.fidelity < fidelity_min:
        raise CorruptDataError(f"{wanted.name} holds a block of a lower rank than its name says")
    info = NamespaceInfo.from_record(block.namespace)
    if info.root != block.root:
        raise CorruptDataError(f"{wanted.name} says that it belongs to another namespace")
    check_block(info.layout, block)
    return block


def parse_blob(blob: memoryview) -> Block:
    """The block of a whole blob, which is verified in itself.

    CorruptDataError, InvalidRequestError for values that no engine takes, UnknownFormatError for another version,
    NotFoundError for an encrypted one.
    """
    length = blob_format.header_length(bytes(blob[: blob_format.LENGTH_BYTES]), len(blob))
    block = blob_format.parse_header(bytes(blob[:length]), len(blob))
    blob_format.require_payload(block, blob[length:])
    return block
