"""One side of one peer, in a process of its own: `python tests/bench/peer_worker.py KIND JSON`.

Answers commands on stdin, one JSON object a line, with one on stdout. `store` and `second` save a sequence, `load`
brings it back to evaluated MLX arrays, `rss` tells the peak. Imports only what its peer needs: the peers do not live in
one environment.
"""

from __future__ import annotations

import abc
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: `tests` is in the repository's root

import mlx.core as mx

SHARED_PERCENT = 90


class Peer(abc.ABC):
    """What a peer can do. `fields`: layers, kv_heads, head_dim, seq_len, and `place`, where it keeps things."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.layers: int = fields["layers"]
        self.heads: int = fields["kv_heads"]
        self.width: int = fields["head_dim"]
        self.length: int = fields["seq_len"]
        self.place: str = fields["place"]
        self._arrays: list[tuple[mx.array, mx.array]] = []
        self._tokens: dict[int, list[int]] = {}

    def arrays(self) -> list[tuple[mx.array, mx.array]]:
        """(keys, values) of every layer, `[1, heads, tokens, width]` in bfloat16, evaluated; made once."""
        if not self._arrays:
            base = mx.random.normal((1, self.heads, self.length, self.width)).astype(mx.bfloat16)
            for index in range(self.layers):
                self._arrays.append((mx.roll(base, 2 * index, 2), mx.roll(base, 2 * index + 1, 2)))
                mx.eval(self._arrays[-1])
        return self._arrays

    def caches(self) -> list[Any]:
        """The arrays as mlx-lm's cache."""
        from mlx_lm.models.cache import KVCache

        made = []
        for keys, values in self.arrays():
            cache = KVCache()
            cache.keys, cache.values, cache.offset = keys, values, self.length
            made.append(cache)
        return made

    def tokens(self, number: int) -> list[int]:
        """A sequence; `1000 + n` shares 90 % with `n`. Made once, before anything is timed."""
        if number not in self._tokens:
            self._tokens[number] = self._new_tokens(number)
        return self._tokens[number]

    def _new_tokens(self, number: int) -> list[int]:
        import numpy as np

        tokens = np.random.default_rng(number % 1000).integers(0, 150_000, self.length + 1)
        if number >= 1000:
            shared = self.length * SHARED_PERCENT // 100
            tokens[shared:] = np.random.default_rng(number).integers(0, 150_000, self.length + 1 - shared)
        found: list[int] = tokens.tolist()
        return found

    @abc.abstractmethod
    def store(self, number: int) -> float | None:
        """Save sequence `number`, until the peer says that it is done; seconds for which its caller was blocked."""

    @abc.abstractmethod
    def load(self, number: int) -> Sequence[mx.array]:
        """The arrays of sequence `number`; the caller evaluates them."""


class Kvstore(Peer):
    """A session with a daemon. `place`: its address and the profile."""

    profile = "raw"

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__(fields)
        from kvstore.bench.rig import PATIENT_MS
        from kvstore.bench.shape import Shape
        from kvstore.client.client import connect
        from kvstore.config import load_config

        memory_bytes = 4 * self.layers * self.heads * self.width * self.length * 2
        flags = {"listen": self.place, "memory_bytes": max(512 << 20, memory_bytes)}
        client = connect(config=load_config(flags, os.devnull, environ={}))
        namespace = Shape(self.layers, self.heads, self.width, self.length, "bf16").namespace(self.profile)
        limits = {"connect_ms": PATIENT_MS, "stall_ms": PATIENT_MS, "total_ms": PATIENT_MS}
        self._session = client.session(namespace, self.profile, **limits)

    def store(self, number: int) -> float | None:
        from kvstore.core.layers import KVLayer

        spec = self._session.namespace.layout.layers[0]
        layers = [KVLayer(spec, (keys,), (values,), self.length) for keys, values in self.arrays()]
        started_s = time.perf_counter()
        assert self._session.store(self.tokens(number), layers).reason == "ok"
        blocked_s = time.perf_counter() - started_s
        assert self._session.flush()
        assert self._session.match(self.tokens(number)).n_tokens == self.length
        return blocked_s

    def load(self, number: int) -> Sequence[mx.array]:
        from kvstore.bench.shape import arrays_of

        hit = self._session.fetch(self.tokens(number))
        assert hit and hit.n_tokens == self.length, hit
        return arrays_of(hit.layers)


class Kvstore8(Kvstore):
    """The same at 8 bits."""

    profile = "affine8"


class MlxLm(Peer):
    """save_prompt_cache and load_prompt_cache. `place`: a folder."""

    def _path(self, number: int) -> str:
        return f"{self.place}/{number}.safetensors"

    def store(self, number: int) -> float | None:
        from mlx_lm.models.cache import save_prompt_cache

        save_prompt_cache(self._path(number), self.caches(), {"tokens": json.dumps(self.tokens(number))})
        return None

    def load(self, number: int) -> Sequence[mx.array]:
        from mlx_lm.models.cache import load_prompt_cache

        return [array for cache in load_prompt_cache(self._path(number)) for array in (cache.keys, cache.values)]


class MlxLmSynced(MlxLm):
    """The same, and the file is on the disk when it is done."""

    def store(self, number: int) -> float | None:
        super().store(number)
        fd = os.open(self._path(number), os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        return None


class Redis(Peer):
    """One value a layer, over a unix socket, by its plain protocol. `place`: the socket."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__(fields)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(self.place)
        self._replies = self._socket.makefile("rb")

    def _send(self, *words: bytes | memoryview) -> None:
        self._socket.sendall(f"*{len(words)}\r\n".encode())
        for word in words:
            self._socket.sendall(f"${len(word)}\r\n".encode())
            self._socket.sendall(word)
            self._socket.sendall(b"\r\n")

    def _name(self, number: int, layer: int) -> bytes:
        prompt = hashlib.sha256(json.dumps(self.tokens(number)).encode()).hexdigest()
        return f"{prompt}:{layer}".encode()

    def store(self, number: int) -> float | None:
        for layer, pair in enumerate(self.arrays()):
            both = mx.stack(pair)
            mx.eval(both)
            self._send(b"SET", self._name(number, layer), memoryview(both.view(mx.uint16)).cast("B"))
            assert self._replies.readline() == b"+OK\r\n"
        return None

    def load(self, number: int) -> Sequence[mx.array]:
        import numpy as np

        arrays = []
        for layer in range(self.layers):
            self._send(b"GET", self._name(number, layer))
            nbytes = int(self._replies.readline()[1:])
            value = np.empty(nbytes // 2, np.uint16)
            assert self._replies.readinto(value.data.cast("B")) == nbytes
            self._replies.read(2)
            both = mx.array(value).view(mx.bfloat16).reshape(2, 1, self.heads, self.length, self.width)
            arrays += [both[0], both[1]]
        return arrays


PEERS = {"kvstore": Kvstore, "kvstore8": Kvstore8, "mlx-lm": MlxLm, "mlx-lm-synced": MlxLmSynced, "redis": Redis}


def answer(peer: Peer, command: dict[str, Any]) -> dict[str, Any]:
    """Carry out one command."""
    if command["do"] == "rss":
        status = Path("/proc/self/status").read_text().splitlines()
        return {"rss_bytes": next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))}
    peer.tokens(command["number"])
    if command["do"] == "store":
        peer.arrays()
        started_s = time.perf_counter()
        blocked_s = peer.store(command["number"])
        seconds = time.perf_counter() - started_s
        made = [array for pair in peer.arrays() for array in pair]
        return {"seconds": seconds, "blocked_s": seconds if blocked_s is None else blocked_s, "digest": digest(made)}
    started_s = time.perf_counter()
    arrays = peer.load(command["number"])
    mx.eval(arrays)
    seconds = time.perf_counter() - started_s
    return {"seconds": seconds, "digest": digest([array[:, :, : peer.length] for array in arrays])}


def digest(arrays: Sequence[mx.array]) -> str:
    """Of the bytes of the first and the last array and the number of all: enough to tell one sequence from another."""
    found = hashlib.sha256(str(len(arrays)).encode())
    for array in (arrays[0], arrays[-1]):
        found.update(memoryview(mx.contiguous(array).view(mx.uint16)))
    return found.hexdigest()


def main() -> None:
    """Answer until stdin ends."""
    fields = json.loads(sys.argv[2])
    kinds: dict[str, type[Peer]] = dict(PEERS)
    if sys.argv[1] not in kinds:
        from tests.bench.peer_vllm import VLLM_PEERS

        kinds.update(VLLM_PEERS)
    peer = kinds[sys.argv[1]](fields)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(peer, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
