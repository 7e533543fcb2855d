"""What is fuzzed: every parser of bytes that somebody else may have written, with what must hold of what it takes.

A target gets any bytes. It may raise what its parser documents, and nothing else; what the parser accepts must survive
being written and parsed again, and must be usable.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgpack
import numpy as np
from google.protobuf.message import DecodeError

from kvstore.blobs import encrypted
from kvstore.blobs import format as blob
from kvstore.blobs.protocol import BlobId
from kvstore.client.plan import Request, parse_plan
from kvstore.codecs.profiles import parse_profile
from kvstore.core.blocks import TOKEN_BYTES, Block, common_tokens, pack_tokens, unpack_tokens
from kvstore.core.keys import Chain, NamespaceInfo
from kvstore.core.layers import Layout, PartSpec
from kvstore.core.records import (
    block_from_record,
    block_to_record,
    runs_from_record,
    runs_to_record,
    templates_by_id,
    unpack_record,
)
from kvstore.errors import CorruptDataError, InvalidRequestError, KVStoreError
from kvstore.index import rows
from kvstore.server.asked_prompt import AskedPrompt, store_request
from kvstore.server.calls.callers import Identities, Peer
from kvstore.wire import convert, frames
from kvstore.wire.v1 import kvstore_pb2 as pb
from tests.support import engine as tiny
from tests.support.telemetry import make_telemetry

CORPUS = Path(__file__).parent / "corpus"
TOKENS = range(300)
KEY = bytes(range(32))
BLOB = BlobId(KEY[::-1], KEY, 7)
SPEC = PartSpec(2, 64, "BF16")
REFUSALS = (KVStoreError, DecodeError)  # the edge of the server and gRPC's own code make typed errors of the second


def header(data: bytes) -> None:
    """A blob's header, after 8 bytes that say how long the file is."""
    _usable(blob.parse_header(data[8:], int.from_bytes(data[:8], "little")))


def record(data: bytes) -> None:
    """A blob's record behind a header that fits it: what the checksum keeps away from the fuzzer."""
    block = block_from_record(data)
    block = replace(block, key=blob._key(block))
    again = block_to_record(block)
    assert block_from_record(again) == block
    built = blob.build_header(block, again)
    whole = len(built) + blob.payload_bytes(block)
    assert blob.parse_header(built, whole) == block
    _usable(block)


def encrypted_header(data: bytes) -> None:
    """The header of an encrypted blob, after 8 bytes that say how long the blob inside is."""
    nbytes, header = int.from_bytes(data[:8], "little"), data[8 : 8 + encrypted.HEADER_BYTES]
    salt = encrypted._require_salt(header.ljust(encrypted.HEADER_BYTES), BLOB, nbytes)
    assert len(salt) == encrypted.SALT_BYTES
    assert encrypted.plain_bytes(encrypted.stored_bytes(nbytes)) == nbytes


def row(data: bytes) -> None:
    """An index row as it is, and with a checksum that fits."""
    try:
        _read_row(rows.parse_row(KEY, data, _templates()))
    except CorruptDataError:
        _read_row(rows.parse_row(KEY, data + rows._check(KEY, data), _templates()))


def runs(data: bytes) -> None:
    """The runs of a block and their templates, as they travel."""
    fields = unpack_record(data)
    if not isinstance(fields, list) or len(fields) != 2 or not isinstance(fields[1], bytes):
        return
    parsed = runs_from_record(fields[1], templates_by_id(fields[0]))
    again, templates = runs_to_record(parsed)
    assert runs_from_record(again, templates) == parsed


def states(data: bytes) -> None:
    """The states of a checkpoint as they travel."""
    parsed = convert.states_from_bytes(data)
    assert convert.states_from_bytes(convert.states_to_bytes(parsed)) == parsed


def layout(data: bytes) -> None:
    """A cache layout."""
    parsed = Layout.from_record(data)
    assert Layout.from_record(parsed.record) == parsed
    assert parsed.token_bytes == sum(parsed.layer_token_bytes(at) for at in range(len(parsed.layers)))


def namespace(data: bytes) -> None:
    """A namespace as the store remembers it."""
    info = NamespaceInfo.from_record(data)
    assert NamespaceInfo.from_record(info.to_record()) == info
    pb.NamespaceStats(id=info.root, alias=info.alias, engine=info.engine, dtype=info.dtype)


def begin_store(data: bytes) -> None:
    """What a worker asks when it stores."""
    message, tokens = frames.parse_prompt(pb.BeginStoreRequest, data)
    identity = Identities().of(message.namespace)
    chain = Chain(identity.root, tokens)
    request = store_request(AskedPrompt(message, chain, identity, Peer(), make_telemetry(), (0, 0)), None)
    if request.namespace:
        assert NamespaceInfo.from_record(request.namespace.to_record()) == request.namespace
    pack_tokens(request.chain.tokens)


def plan(data: bytes) -> None:
    """What a daemon answers to a fetch: a client takes nothing on trust."""
    ns = tiny.namespace(layout=tiny.LAYOUT)
    for dense in (False, True):
        try:
            made = parse_plan(pb.FetchPlan.FromString(data), Request(ns, Chain(ns.root, pack_tokens(TOKENS)), 0, dense))
        except (CorruptDataError, InvalidRequestError):
            continue
        assert made.n_tokens < len(TOKENS)
        assert made.nbytes >= 0


def fetch_reply(data: bytes) -> None:
    """A message read around protobuf is the message that protobuf reads."""
    parsed = frames.parse_fetch_reply(data)
    same = pb.FetchReply.FromString(data)
    if isinstance(parsed, frames.LayerBytes):
        assert (parsed.layer, bytes(parsed.data)) == (same.chunk.layer, same.chunk.data)
        assert frames.parse_fetch_reply(frames.layer_frame(parsed.layer, [parsed.data])) == parsed
    else:
        assert parsed == same


def upload_chunk(data: bytes) -> None:
    """As `fetch_reply`."""
    parsed = frames.parse_upload_chunk(data)
    same = pb.UploadChunk.FromString(data)
    assert (parsed.upload_id, bytes(parsed.data)) == (same.upload_id, same.data)
    assert frames.parse_upload_chunk(frames.upload_frame(parsed.upload_id, [parsed.data])) == parsed


def profile(data: bytes) -> None:
    """The name of a profile."""
    made = parse_profile(data.decode(errors="replace"))
    assert made.fidelity >= 0
    assert made.spec
    for part in ("keys", "values"):
        for layer in (0, 5):
            made.recipe(part, SPEC, layer, 8)


def tokens(data: bytes) -> None:
    """Packed tokens: there and back, their codes in order, their prefixes in common."""
    packed = pack_tokens(data)
    ids = unpack_tokens(packed)
    assert pack_tokens(ids) == packed
    assert len(Chain(KEY, packed).keys()) == len(ids) // 256
    half = len(ids) // 2 * TOKEN_BYTES
    one, two = packed[:half], packed[half : 2 * half]
    shared = next((at for at, (a, b) in enumerate(zip(ids, ids[half // 8 :], strict=False)) if a != b), half // 8)
    assert common_tokens(one, two) == min(shared, half // 8)
    for level in range(len(ids) // rows.LEVEL_TOKENS + 1):
        code = rows.level_code(packed, level, None)
        assert len(code) <= 9 * rows.LEVEL_TOKENS
        part = ids[level * rows.LEVEL_TOKENS : (level + 1) * rows.LEVEL_TOKENS]
        assert code == b"".join(map(rows.token_code, part))


@dataclass(frozen=True)
class Target:
    """One parser. `seeds`: valid inputs, of which the corpus is made."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


def strike(target: Target, data: bytes) -> str:
    """What is wrong with how it takes these bytes; empty when nothing is."""
    try:
        target.run(data)
    except REFUSALS:
        return ""
    except Exception as error:  # noqa: BLE001  # whatever it is, it is what we look for
        return f"{target.run.__name__}: {error!r} for {data.hex()}"
    return ""


def corpus(name: str) -> list[bytes]:
    """The committed inputs of a target."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


# -- what must hold of what was accepted ----------------------------------------------------------------------------


def _usable(block: Block) -> None:
    """Ranges within the payload, one after the other."""
    end = 0
    for offset, nbytes, _ in blob.checked_ranges(block):
        assert offset == end
        end += nbytes
    assert end == blob.payload_bytes(block)


def _read_row(parsed: rows.Row) -> None:
    assert parsed.end == parsed.start + parsed.n_tokens
    assert all(len(entry) <= 511 for entry in rows.child_entries(parsed, None))
    taken = (parsed.key, parsed.value, 0)
    assert rows.kinds_of([taken]) == {(parsed.fidelity, parsed.templates_digest)}
    payload_bytes = parsed.blob_bytes - parsed.payload_offset
    assert rows.sizes_of([taken]) == [(payload_bytes, parsed.templates_digest, taken[2])]
    if not parsed.is_key_missing:
        assert parsed.block.n_tokens == parsed.n_tokens


# -- seeds ------------------------------------------------------------------------------------------------------------


def _blocks() -> list[Block]:
    """Stored blocks: a full one, a tail, a checkpoint; and one of packed shares and groups, from the golden files."""
    ns = tiny.namespace()
    made = [*tiny.sequence(ns, TOKENS), tiny.checkpoint(tiny.namespace(layout=tiny.HYBRID), TOKENS)]
    plain = [blob.make_ready(replace(new.block, namespace=ns.to_record()), new.buffers).block for new in made]
    return [*plain, *(blob.parse_header(head, size) for head, size in _golden())]


def _golden() -> list[tuple[bytes, int]]:
    """Header and file size of the golden blobs."""
    found = []
    for path in sorted((CORPUS.parent.parent / "golden").glob("*.safetensors")):
        data = path.read_bytes()
        found.append((data[: blob.header_length(data[:8], len(data))], len(data)))
    return found


def _headers() -> list[bytes]:
    return [size.to_bytes(8, "little") + head for head, size in _golden()]


def _rows() -> list[bytes]:
    """Values without their checksums, which the target adds."""
    return [rows.pack_row(block, 3, 512, 4096).value[: -rows.CHECK_BYTES] for block in _blocks()]


def _runs() -> list[bytes]:
    """Templates, and the runs that name them."""
    made = [runs_to_record(block.runs) for block in _blocks() if block.runs]
    return [msgpack.packb([list(templates.values()), packed]) for packed, templates in made]


@functools.cache
def _templates() -> dict[bytes, bytes]:
    """Those that an index has beside its rows: of all seeds."""
    return {name: record for block in _blocks() for name, record in runs_to_record(block.runs)[1].items()}


def _begin_stores() -> list[bytes]:
    made = []
    for shape in (tiny.LAYOUT, tiny.HYBRID):
        ns = tiny.namespace(layout=shape)
        offered = [state for block in _blocks() for state in block.states if shape is tiny.HYBRID]
        request = pb.BeginStoreRequest(
            namespace=convert.namespace_to_message(ns),
            layout=shape.record,
            tokens=pack_tokens(range(9)),
            captured_from=1,
            restored_tokens=3,
            restored_fidelity=800,
            profile="affine8",
            states=convert.states_to_bytes(offered[:1]),
        )
        made.append(request.SerializeToString())
    return made


def _plans() -> list[bytes]:
    """Packed by path and by stream, and dense."""
    ns, made = tiny.namespace(), []
    blocks = _blocks()[:2]
    for path in ("/data/blob", ""):
        slices = [
            pb.BlockSlice(key=b.key, n_tokens=n, runs=runs_to_record(b.runs)[0], path=path, file_bytes=9000)
            for b, n in zip(blocks, (256, 43), strict=True)
        ]
        common = {"layout": ns.layout.record, "templates": runs_to_record(blocks[0].runs)[1].values()}
        made.append(pb.FetchPlan(n_tokens=299, reason="ok", fidelity=7, blocks=slices, **common))
    return [one.SerializeToString() for one in made]


def _encrypted_headers() -> list[bytes]:
    sizes = (1, 1 << 40)
    return [size.to_bytes(8, "little") + encrypted._header(BLOB, KEY[: encrypted.SALT_BYTES], size) for size in sizes]


def _uploads() -> list[bytes]:
    return [frames.upload_frame("0" * 32, [b"data", b"more"]), frames.upload_frame("", [bytes(200)])]


def _replies() -> list[bytes]:
    planned = pb.FetchReply(plan=pb.FetchPlan.FromString(_plans()[1]))
    return [frames.layer_frame(3, [b"data"]), frames.layer_frame(0, [bytes(200)]), planned.SerializeToString()]


def _profiles() -> list[bytes]:
    named = ["exact", "tiny", "raw", "affine4-g32", "channel4:turboquant-mse3,edge2=affine8:raw,sinks4,min512"]
    return [name.encode() for name in [*named, "channel6:lossless,rest=raw"]]


def _tokens() -> list[bytes]:
    odd = [0, 7, -1, 1 << 23, (1 << 23) - 1, (1 << 63) - 1, -(1 << 63)]
    return [pack_tokens(odd * 2), np.arange(600, dtype="<i8").tobytes(), struct.pack("<q", -200)]


def _namespaces() -> list[bytes]:
    return [tiny.namespace(layout=shape).to_record() for shape in (tiny.LAYOUT, tiny.HYBRID)]


def _layouts() -> list[bytes]:
    nested = Layout(tiny.HYBRID.layers, "(.)(.)")
    return [shape.record for shape in (tiny.LAYOUT, tiny.HYBRID, tiny.RECURRENT, nested)]


TARGETS = {
    "header": Target(header, _headers),
    "record": Target(record, lambda: [block_to_record(block) for block in _blocks()]),
    "encrypted": Target(encrypted_header, _encrypted_headers),
    "row": Target(row, _rows),
    "runs": Target(runs, _runs),
    "states": Target(states, lambda: [convert.states_to_bytes(block.states) for block in _blocks() if block.states]),
    "layout": Target(layout, _layouts),
    "namespace": Target(namespace, _namespaces),
    "begin_store": Target(begin_store, _begin_stores),
    "plan": Target(plan, _plans),
    "fetch_reply": Target(fetch_reply, _replies),
    "upload_chunk": Target(upload_chunk, _uploads),
    "profile": Target(profile, _profiles),
    "tokens": Target(tokens, _tokens),
}
