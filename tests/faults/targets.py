"""What is fuzzed: every parser of bytes that somebody else may have written, with what must hold of what it takes.

A target gets any bytes. It may raise what its parser documents, and nothing else; what the parser accepts must survive
being written and parsed again, and must be usable.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError

from kvstore.blobs import format as blob
from kvstore.blocks import KEY_BYTES, TOKEN_BYTES, Block, common_tokens, pack_tokens, unpack_tokens
from kvstore.client.plan import Request, parse_plan
from kvstore.codecs.profiles import parse_profile
from kvstore.engine import rows, sealed
from kvstore.errors import CorruptDataError, InvalidRequestError, KVStoreError
from kvstore.keys import NamespaceInfo, block_key, chain_keys, checkpoint_key
from kvstore.layers import Layout, PartSpec
from kvstore.records import block_from_record, block_to_record
from kvstore.server.service import store_request
from kvstore.wire import convert, frames
from kvstore.wire.v1 import kvstore_pb2 as pb
from tests.support import engine as tiny

CORPUS = Path(__file__).parent / "corpus"
TOKENS = range(300)
KEY = bytes(range(32))
SPEC = PartSpec(2, 64, "BF16")
REFUSALS = (KVStoreError, DecodeError)  # the edge of the server and gRPC's own code make typed errors of the second


def header(data: bytes) -> None:
    """A blob's header, after 8 bytes that say how long the file is."""
    _usable(blob.parse_header(data[8:], int.from_bytes(data[:8], "little")))


def record(data: bytes) -> None:
    """A blob's record behind a header that fits it: what the checksum keeps away from the fuzzer."""
    block = block_from_record(data)
    key = (checkpoint_key if block.is_checkpoint else block_key)(block.parent, block.tokens)
    block = replace(block, key=key)
    again = block_to_record(block)
    assert block_from_record(again) == block
    built = blob.build_header(block, again)
    whole = len(built) + blob.payload_bytes(block)
    assert blob.parse_header(built, whole) == block
    _usable(block)


def sealed_header(data: bytes) -> None:
    """The header of an encrypted blob."""
    root, key, inner_bytes = sealed._parse_header(data[: sealed.HEADER_BYTES].ljust(sealed.HEADER_BYTES))
    assert (len(root), len(key)) == (KEY_BYTES, KEY_BYTES)
    assert sealed.sealed_bytes(inner_bytes) > inner_bytes


def row(data: bytes) -> None:
    """An index row as it is, and with a checksum that fits."""
    try:
        _read_row(rows.parse_row(KEY, data))
    except CorruptDataError:
        _read_row(rows.parse_row(KEY, data + rows._check(KEY, data)))


def runs(data: bytes) -> None:
    """The runs of a block as they travel."""
    parsed = convert.runs_from_bytes(data)
    assert convert.runs_from_bytes(convert.runs_to_bytes(parsed)) == parsed


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
    request = store_request(pb.BeginStoreRequest.FromString(data))
    if request.namespace:
        assert NamespaceInfo.from_record(request.namespace.to_record()) == request.namespace
    pack_tokens(request.tokens)


def plan(data: bytes) -> None:
    """What a daemon answers to a fetch: a client takes nothing on trust."""
    ns = tiny.namespace(layout=tiny.LAYOUT)
    for dense in (False, True):
        try:
            made = parse_plan(pb.FetchPlan.FromString(data), Request(ns, pack_tokens(TOKENS), 0, dense))
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
    assert len(chain_keys(KEY, packed)) == len(ids) // 256
    half = len(ids) // 2 * TOKEN_BYTES
    one, two = packed[:half], packed[half : 2 * half]
    shared = next((at for at, (a, b) in enumerate(zip(ids, ids[half // 8 :], strict=False)) if a != b), half // 8)
    assert common_tokens(one, two) == min(shared, half // 8)
    code = rows.Code.of(packed)
    assert len(code.data) <= rows.CODE_BYTES_MAX
    assert code.data.startswith(b"".join(map(rows.token_code, ids[: len(code.ends)])))


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
    assert len(rows.child_entry(parsed)) <= 511
    rows.fidelity_of(parsed.value)
    rows.recipes_of([(parsed.key, parsed.value, 0)])
    if not parsed.is_sealed:
        assert parsed.block.n_tokens == parsed.n_tokens


# -- seeds ------------------------------------------------------------------------------------------------------------


def _blocks() -> list[Block]:
    """Sealed blocks: a full one, a tail, a checkpoint; and one of packed shares and groups, from the golden files."""
    ns = tiny.namespace()
    made = [*tiny.sequence(ns, TOKENS), tiny.checkpoint(tiny.namespace(layout=tiny.HYBRID), TOKENS)]
    plain = [blob.seal(replace(new.block, namespace=ns.to_record()), new.buffers).block for new in made]
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
    return [rows.pack_row(block, 3, 9, 512, 4096).value[: -rows.CHECK_BYTES] for block in _blocks()]


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
            pb.BlockSlice(key=b.key, n_tokens=n, runs=convert.runs_to_bytes(b.runs), path=path, file_bytes=9000)
            for b, n in zip(blocks, (256, 43), strict=True)
        ]
        made.append(pb.FetchPlan(n_tokens=299, reason="ok", fidelity=7, layout=ns.layout.record, blocks=slices))
    return [one.SerializeToString() for one in made]


def _sealed_headers() -> list[bytes]:
    return [sealed._header(KEY, KEY[::-1], KEY[:16], nbytes) for nbytes in (1, 1 << 40)]


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
    "sealed": Target(sealed_header, _sealed_headers),
    "row": Target(row, _rows),
    "runs": Target(runs, lambda: [convert.runs_to_bytes(block.runs) for block in _blocks() if block.runs]),
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
