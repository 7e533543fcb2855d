"""Files that somebody else put where blobs belong: bombs, lies, links and pipes, each as the KV of a prompt.

Whoever may write to the directory may store what they like, checksums and all; that is not what this is about. None of
these is a blob that holds what it says, and each asks a careless reader for more memory, another file, or for ever.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import msgpack
import xxhash
import zstandard

from kvstore.blobs.format import FORMAT_VERSION, make_ready, table
from kvstore.blobs.protocol import BlobId
from kvstore.codecs.exact import LOSSLESS
from kvstore.core.blocks import Block, Stack, Tensor, pack_tokens
from kvstore.core.keys import Namespace
from kvstore.core.records import RUN, Template, block_to_record, runs_to_record
from tests.support.engine import new_block
from tests.support.files import files_below

NUMBER = 900_000
BOMB_BYTES = 1 << 28
Plant = Callable[["Prompt", Path], None]


class Prompt:
    """What a planted file claims to hold: the one block of a prompt that nobody stored."""

    def __init__(self, namespace: Namespace, number: int) -> None:
        self.tokens = [7_000_000 + number] * 40
        new = new_block(namespace.root, namespace.root, 0, pack_tokens(self.tokens), layout=namespace.layout)
        self.block = replace(new.block, namespace=namespace.to_record(), created_s=1)
        self.ready = make_ready(self.block, new.buffers)
        self.payload = b"".join(self.ready.payload)

    def path(self, data_dir: Path) -> Path:
        """Where its blob would be."""
        root, key = self.block.root, self.block.key
        return data_dir / "blobs.noindex" / root.hex() / BlobId(root, key, NUMBER).name

    def altered(self, change: Callable[[Tensor], Tensor]) -> Block:
        """The block, as it is stored, with other tensors."""

        def stack_of(stack: Stack) -> Stack:
            return replace(stack, tensors=tuple(change(tensor) for tensor in stack.tensors))

        runs = (replace(run, stacks=tuple(map(stack_of, run.stacks))) for run in self.ready.block.runs)
        return replace(self.ready.block, runs=tuple(runs))


def forged(record: bytes, entries: dict[str, Any], payload: bytes, version: str = str(FORMAT_VERSION)) -> bytes:
    """A file with a right checksum over whatever record, and whatever table."""
    check, text64 = xxhash.xxh3_64_hexdigest(record), base64.b64encode(record).decode()
    metadata = {"format": "kvstore-block", "version": version, "record": text64, "check": check}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    return _with_header(text, payload)


def _with_header(text: bytes, payload: bytes = b"") -> bytes:
    size = -(-(8 + len(text)) // 64) * 64 - 8
    return size.to_bytes(8, "little") + text.ljust(size) + payload


def _bytes(make: Callable[[Prompt], bytes]) -> Plant:
    return lambda prompt, path: path.write_bytes(make(prompt)) and None


def _sparse(first: bytes, size: int) -> Plant:
    def plant(_: Prompt, path: Path) -> None:
        path.write_bytes(first)
        os.truncate(path, size)

    return plant


def _altered(change: Callable[[Tensor], Tensor]) -> Plant:
    """With the record changed, the table as it was, and everything else in order."""

    def make(prompt: Prompt) -> bytes:
        # Writing a template refuses what reading one refuses.
        with mock.patch("kvstore.core.records.parse_template", _taken_as_it_is):
            record = block_to_record(prompt.altered(change))
        return forged(record, table(prompt.ready.block), prompt.payload)

    return _bytes(make)


def _taken_as_it_is(record: bytes) -> Template:
    return Template(xxhash.xxh3_128_digest(record), record, (), ())


def _moved(change: Callable[[list[int]], list[int]]) -> Plant:
    """With other places in the table of tensors, and the record as it was."""

    def make(prompt: Prompt) -> bytes:
        entries = {
            name: {**entry, "data_offsets": change(entry["data_offsets"])}
            for name, entry in table(prompt.ready.block).items()
        }
        return forged(block_to_record(prompt.ready.block), entries, prompt.payload)

    return _bytes(make)


def _frame_of_zeros(nbytes: int) -> bytes:
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=nbytes)
    piece = bytes(1 << 20)
    return b"".join([*(compressor.compress(piece) for _ in range(nbytes >> 20)), compressor.flush()])


def _packed(frame_of: Callable[[int], bytes]) -> Plant:
    """A blob in perfect order, whose lossless shares are not what they should be; `frame_of`: of how many bytes."""

    def make(prompt: Prompt) -> bytes:
        stacks, buffers = [], []
        run = prompt.block.runs[0]
        for stack in run.stacks:
            [tensor] = stack.tensors
            frame = frame_of(tensor.layer_bytes(run.n_tokens))
            lengths = (len(frame),) * len(stack.layers)
            stacks.append(replace(stack, recipe=LOSSLESS, tensors=(replace(tensor, lengths=lengths),)))
            buffers.append(frame * len(stack.layers))
        ready = make_ready(replace(prompt.block, runs=(replace(run, stacks=tuple(stacks)),)), buffers)
        return ready.header + b"".join(ready.payload)

    return _bytes(make)


def _lying_frame(nbytes: int) -> bytes:
    """Says that it holds what it should, and holds nothing of it."""
    return bytes.fromhex("28b52ffde0") + nbytes.to_bytes(8, "little") + bytes.fromhex("030000")


def _link(make: Callable[[Path, Path], None], is_sound: bool) -> Plant:
    """A link to a file outside, which is a sound blob or something else."""

    def plant(prompt: Prompt, path: Path) -> None:
        outside = path.parents[2].with_name(f"outside-{path.name[:8]}")
        outside.write_bytes(
            prompt.ready.header + prompt.payload if is_sound else b"root:x:0:0:root:/root:/bin/sh\n" * 9
        )
        make(outside, path)

    return plant


def _of_another(prompt: Prompt, path: Path) -> None:
    """A sound blob under the name of another block."""
    data_dir = path.parents[2]
    planted = f"-{NUMBER}.safetensors"
    sound = files_below(data_dir / "blobs.noindex", ".safetensors")
    first = next(found for found in sound if not found.name.endswith(planted))
    path.write_bytes(first.read_bytes())


def _deep(depth: int) -> bytes:
    return b"\x91" * depth + b"\x90"


PLANTS: dict[str, Plant] = {
    "a header without end": _sparse((1 << 62).to_bytes(8, "little"), 1 << 34),
    "a header of the whole file": _sparse((BOMB_BYTES - 8).to_bytes(8, "little"), BOMB_BYTES),
    "nested JSON": _bytes(lambda _: _with_header(b"[" * 1_000_000)),
    "wide JSON": _bytes(lambda _: _with_header(b'{"__metadata__":[' + b"[]," * 340_000 + b"[]]}")),
    "a long number": _bytes(lambda _: _with_header(b'{"__metadata__":' + b"9" * 1_000_000 + b"}")),
    "nested msgpack": _bytes(lambda _: forged(_deep(700_000), {}, b"")),
    "wide msgpack": _bytes(lambda _: forged(b"\xdd" + (700_000).to_bytes(4, "big") + b"\x90" * 700_000, {}, b"")),
    "msgpack of 4 billion": _bytes(lambda _: forged(b"\xdd\xff\xff\xff\xff", {}, b"")),
    "runs without end": _bytes(lambda p: forged(_with_runs(p, 20_000), {}, p.payload)),
    "tensors on top of each other": _moved(lambda place: [0, place[1] - place[0]]),
    "tensors beyond the end": _moved(lambda place: [place[0] + (1 << 40), place[1] + (1 << 40)]),
    "tensors larger than the file": _altered(lambda tensor: replace(tensor, heads=tensor.heads << 30)),
    "tensors with paths for names": _altered(lambda tensor: replace(tensor, name="../../../etc/passwd")),
    "tensors without checksums": _altered(lambda tensor: replace(tensor, checksums=b"")),
    "wrong checksums": _altered(lambda tensor: replace(tensor, checksums=bytes(len(tensor.checksums)))),
    "packed tensors of 4 TiB": _altered(lambda tensor: replace(tensor, heads=1 << 30, lengths=(9,) * 2)),
    "frames that unpack to 256 MiB": _packed(lambda _: _frame_of_zeros(BOMB_BYTES)),
    "frames that lie": _packed(_lying_frame),
    "frames that are none": _packed(lambda nbytes: bytes(nbytes // 2)),
    "a symlink to a sound blob": _link(lambda outside, path: path.symlink_to(outside), is_sound=True),
    "a symlink to a file": _link(lambda outside, path: path.symlink_to(outside), is_sound=False),
    "a symlink to nothing": lambda _, path: path.symlink_to("/nonexistent/blob"),
    "a symlink to a device": lambda _, path: path.symlink_to("/dev/zero"),
    "a hard link to a file": _link(lambda outside, path: path.hardlink_to(outside), is_sound=False),
    "a FIFO": lambda _, path: os.mkfifo(path),
    "a folder": lambda _, path: path.mkdir(),
    "the blob of another block": _of_another,
    "nothing": _bytes(lambda _: b""),
    "a name that is no text": lambda _, path: _odd(path, b"\xff\xfe.safetensors"),
    "a name with a line in it": lambda _, path: _odd(path, b"a\nb \x1b[31m.safetensors"),
}
# In perfect order but for what is packed in them: taken in, and a miss for whoever fetches them.
TAKEN_IN = ("frames that unpack to 256 MiB", "frames that lie", "frames that are none")


def _with_runs(prompt: Prompt, count: int) -> bytes:
    """The record with so many runs of one token, none of which says a checksum."""
    fields = msgpack.unpackb(block_to_record(prompt.ready.block))
    [template] = runs_to_record(prompt.ready.block.runs)[1]
    fields[9] = RUN.pack(1, 0, 1, 0, 0, template) * count
    packed: bytes = msgpack.packb(fields)
    return packed


def _odd(path: Path, name: bytes) -> None:
    (path.parent / os.fsdecode(name)).write_bytes(b"x" * 100)


def plant_all(data_dir: Path, namespace: Namespace) -> dict[str, Prompt]:
    """Plant everything; which prompt each of them claims."""
    prompts = {}
    for number, (name, plant) in enumerate(PLANTS.items()):
        prompt = prompts[name] = Prompt(namespace, number)
        path = prompt.path(data_dir)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        plant(prompt, path)
    outside = data_dir.with_name("outside")
    outside.write_bytes(b"not yours")
    return prompts
