"""`kvstore bench transport`: time to transfer the bytes of one sequence, by path and by stream."""

from __future__ import annotations

import functools
from dataclasses import asdict

import mlx.core as mx

from kvstore.bench.bare import bare_server
from kvstore.bench.cases import Case, Report, measure
from kvstore.bench.rig import fetch, rig
from kvstore.bench.shape import Memory, Shape, arrays_of, save

PROFILE = "raw"


def run(shape: Shape, rounds: int) -> Report:
    """Raw KV by both ways, beside a memcpy, a plain read of one file and a bare gRPC stream of as many bytes."""
    with rig(shape) as made, bare_server() as bare:
        made.put(PROFILE)
        session, tokens = made.session(PROFILE), shape.tokens(0)
        file, memory = made.daemon.folder / "plain.safetensors", Memory(shape.nbytes)
        save(file, arrays_of(shape.kv()))
        mx.clear_cache()
        cases = [
            Case("memcpy", memory.copy, nbytes=shape.nbytes),
            Case("plain read of one file", functools.partial(memory.read, file), "memcpy", shape.nbytes),
            Case("bare gRPC stream", functools.partial(bare.stream, shape.nbytes), "memcpy", shape.nbytes),
            Case(
                "fetch by path",
                functools.partial(fetch, shape, session, tokens, "packed", "path"),
                "plain read of one file",
                shape.nbytes,
            ),
            Case(
                "fetch by stream",
                functools.partial(fetch, shape, session, tokens, "packed", "stream"),
                "bare gRPC stream",
                shape.nbytes,
                at_most=1.25,
            ),
        ]
        return Report("transport", asdict(shape), measure(cases, rounds))
