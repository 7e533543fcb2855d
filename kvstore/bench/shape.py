"""Synthetic KV of a given size: the layout, arrays to store, and files that hold the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from kvstore.bench.bulk import sequence_tokens
from kvstore.core.keys import Namespace
from kvstore.core.layers import PARTS, KVLayer, LayerSpec, Layout, PartSpec, StateLayer

DTYPES = {"bf16": ("BF16", mx.bfloat16), "f16": ("F16", mx.float16), "f32": ("F32", mx.float32)}


@dataclass(frozen=True)
class Shape:
    """Equal layers of plain KV. `dtype`: bf16, f16 or f32."""

    layers: int
    kv_heads: int
    head_dim: int
    seq_len: int
    dtype: str

    @property
    def layout(self) -> Layout:
        """The layout of the cache."""
        part = PartSpec(self.kv_heads, self.head_dim, DTYPES[self.dtype][0])
        return Layout((LayerSpec(part, part),) * self.layers)

    @property
    def nbytes(self) -> int:
        """Raw bytes of one sequence."""
        return self.seq_len * self.layout.token_bytes

    def namespace(self, name: str) -> Namespace:
        """A namespace for benches; each name gives a different one."""
        return Namespace(
            weights=f"kvstore bench {name}".encode(),
            layout=self.layout,
            dtype=DTYPES[self.dtype][0],
            engine="bench 1",
            alias=f"bench {name}",
        )

    def tokens(self, number: int) -> bytes:
        """Packed tokens of sequence `number`, one more than the KV has: a fetch leaves the last token out."""
        return sequence_tokens(number, self.seq_len + 1)

    def kv(self, n_tokens: int | None = None) -> list[KVLayer]:
        """Evaluated layers of normally distributed values, all different, on this thread."""
        length = self.seq_len if n_tokens is None else n_tokens
        spec = self.layout.layers[0]
        base = mx.random.normal((1, self.kv_heads, length, self.head_dim)).astype(DTYPES[self.dtype][1])
        made = []
        for index in range(self.layers):
            keys, values = (mx.roll(base, 2 * index + part, 2) for part in range(2))
            mx.eval(keys, values)
            made.append(KVLayer(spec, (keys,), (values,), length))
        return made


def arrays_of(layers: Sequence[KVLayer | StateLayer]) -> list[mx.array]:
    """All arrays of kv layers."""
    return [array for layer in layers if isinstance(layer, KVLayer) for part in PARTS for array in layer.part(part)]


def save(path: Path, arrays: Sequence[mx.array]) -> int:
    """Write these arrays to one safetensors file. Returns the payload bytes."""
    mx.save_safetensors(str(path), {f"a{index:04d}": array for index, array in enumerate(arrays)})
    return sum(array.nbytes for array in arrays)


def load(path: Path) -> list[mx.array]:
    """What `save` saved, in order, evaluated."""
    loaded: Any = mx.load(str(path))
    arrays = [loaded[name] for name in sorted(loaded)]
    mx.eval(arrays)
    return arrays


class Memory:
    """Two buffers of equal size, already paged in: for a memcpy, and for a read into existing memory."""

    def __init__(self, nbytes: int) -> None:
        self.source = np.ones(nbytes, np.uint8)
        self.target = np.zeros(nbytes, np.uint8)

    def copy(self) -> None:
        """One memcpy of all bytes."""
        np.copyto(self.target, self.source)

    def read(self, path: Path) -> None:
        """The file's bytes, at most as many as fit, by plain reads."""
        view = self.target.data
        with path.open("rb", buffering=0) as file:
            while view.nbytes and (got := file.readinto(view)):
                view = view[got:]
