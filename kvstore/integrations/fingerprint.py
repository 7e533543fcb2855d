"""Fingerprint of a loaded model: a digest of its structure and weights in memory.

A digest of the files is not enough: arguments can be overridden at load, a model can be quantized or get an adapter
afterwards, and a folder can be replaced while it is read. The fingerprint is a SHA-256 over the tree of modules in name
order:

    class names, and every public attribute that is a number, string or container of these (LoRA scale, bits, group
    size, the arguments the model was built with)
    name, dtype and shape of every parameter, `SAMPLES` of its values as raw bits, and the sum of the raw bits of each
    of its rows: a few trained rows of an embedding are a change that samples alone would miss

Private attributes, `training`, counters, objects and functions are left out, so the result is the same in every
process, and before and after a generation. It takes one pass over the weights, BATCH_BYTES at a time, when a model is
first seen or its parameters were replaced (`stamp`), and is never kept on a disk. Sums of integers wrap, so they are
equal in any order and on any device. Not noticed are weights that are written in place (`weight[rows] = values`) after
a model was first used: load it again, or replace the parameter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

SAMPLES = 16
# mlx-lm leaves an adapter unevaluated after it has evaluated the model. Such a rest is evaluated here, as the next
# forward pass would; a model that was loaded lazily is not read behind its owner's back. By bytes.
LAZY_SHARE_MAX = 0.25

# Arrays are summed in pieces of this many bytes, which bounds the copies of arrays that are not contiguous.
BATCH_BYTES = 256 << 20

_TAG = b"kvstore/fingerprint/v2\0"
_PLAIN = (bool, int, float, str, bytes, mx.Dtype)  # their reprs say everything and are the same in every process
# Attributes that a forward pass or a mode changes. Most such state is private; these are not.
_TRANSIENT = frozenset({"training", "offset", "step", "rope_deltas", "position_ids", "no_chunked_prefill"})


def fingerprint(*models: Any) -> bytes | None:
    """32 bytes for the main model and its draft models, in this order; None while weights are not evaluated.

    Call it on the thread that owns the arrays. None too when there is no main model, or one of them is not an
    `mlx.nn.Module`, since nothing is known of its weights then. A model that is None after the first is left out.
    """
    present = [model for model in models if model is not None]
    if not models or models[0] is None or not all(isinstance(model, Module) for model in present):
        return None
    tree = _Tree()
    lines = [line for number, model in enumerate(present) for line in tree.lines(str(number), model)]
    if not _evaluated(tree.arrays):
        return None
    digest = hashlib.sha256(_TAG)
    digest.update(_utf8("\n".join(lines)))
    digest.update(_samples(tree.arrays))
    for sums in _row_sums(tree.arrays):
        digest.update(sums)
    return digest.digest()


def stamp(*models: Any) -> int:
    """A number that changes when parameters or public attributes of the models are replaced in memory.

    Cheap, and of this process only: it compares which objects are there, never what they hold. Any thread.
    """
    return hash(tuple(_ids(model) for model in models))


def _ids(value: Any) -> Any:
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, (Module, list, tuple)):
        return tuple(_ids(child) for _, child in _children(value))
    return id(value)


class _Tree:
    """Walks modules and what they hold. `arrays`: the parameters met so far, in the order of their lines."""

    def __init__(self) -> None:
        self.arrays: list[mx.array] = []
        self._above: set[int] = set()
        self._known: dict[int, str] = {}

    def lines(self, path: str, value: Any) -> list[str]:
        """One line for each public module, parameter and plain value below `value`, in name order."""
        if value is None or isinstance(value, _PLAIN):
            return [f"{path}={value!r}"]
        if isinstance(value, mx.array):
            self.arrays.append(value)
            return [f"{path}: {value.dtype} {value.shape}"]
        if id(value) in self._above:
            return []  # a cycle
        self._above.add(id(value))
        try:
            if isinstance(value, SimpleNamespace) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
                return [f"{path}={self._arguments(value)}"]
            return [line for name, child in _children(value) for line in self.lines(f"{path}.{name}", child)]
        finally:
            self._above.discard(id(value))

    def _arguments(self, value: Any) -> str:
        """The arguments of a model, read once: in many models each layer holds the same ones."""
        if id(value) not in self._known:
            slots = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
            found = {field.name: getattr(value, field.name, None) for field in slots}
            text = "\n".join(self.lines("", {**found, **getattr(value, "__dict__", {})}))
            self._known[id(value)] = hashlib.sha256(_utf8(text)).hexdigest()
        return self._known[id(value)]


def _children(value: Any) -> list[tuple[str, Any]]:
    """The public parts of a module or container, in name order; none of anything else."""
    if isinstance(value, Module):
        found: dict[str, Any] = {"class": type(value).__name__, **vars(value), **value}
    elif isinstance(value, Mapping):
        found = {str(name): child for name, child in value.items()}
    elif isinstance(value, (list, tuple)):
        return [("length", len(value)), *((str(number), child) for number, child in enumerate(value))]
    elif isinstance(value, (set, frozenset)):
        return [("set", sorted(repr(one) for one in value if isinstance(one, _PLAIN)))]
    else:
        return []
    return [(name, found[name]) for name in sorted(found) if not name.startswith("_") and name not in _TRANSIENT]


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _evaluated(arrays: list[mx.array]) -> bool:
    """Whether (nearly, see `LAZY_SHARE_MAX`) all arrays have their values.

    MLX has no flag for it. But an evaluated array has let go of the operations that made it, and the export of its
    graph then shows none: 1 ms for 1,000 arrays, and nothing is evaluated.
    """
    if not _operations(*arrays):
        return True
    bound = LAZY_SHARE_MAX * sum(array.nbytes for array in arrays)
    lazy_bytes = 0
    # The largest first: a lazily loaded model is known by its first few.
    for array in sorted(arrays, key=lambda one: one.nbytes, reverse=True):
        lazy_bytes += array.nbytes if _operations(array) else 0
        if lazy_bytes > bound:
            return False
    return True


def _operations(*arrays: mx.array) -> bool:
    """Whether any array still has to be computed."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    return "->" in graph.getvalue()


def _samples(arrays: list[mx.array]) -> bytes:
    """`SAMPLES` values of each array as raw bits, in one evaluation.

    Taken by one index per axis: flattening would copy a whole weight that is transposed.
    """
    places: dict[tuple[int, ...], tuple[mx.array, ...]] = {}
    taken = []
    for array in arrays:
        if array.size:
            if array.shape not in places:
                places[array.shape] = _places(array.shape)
            found = array[places[array.shape]] if array.ndim else array[None]
            taken.append(found.view(mx.uint8))
    if not taken:
        return b""
    bits = mx.concatenate(taken)
    mx.eval(bits)
    return np.array(bits).tobytes()


def _row_sums(arrays: list[mx.array]) -> Iterator[bytes]:
    """The sums of all rows of each array, as bytes, one evaluation for BATCH_BYTES of arrays."""
    batch: list[mx.array] = []
    nbytes = 0
    for number, array in enumerate(arrays):
        if array.size:
            batch.append(_words(array).sum(axis=-1).reshape(-1))
            nbytes += array.nbytes
        if batch and (nbytes >= BATCH_BYTES or number == len(arrays) - 1):
            sums = mx.concatenate(batch)
            mx.eval(sums)
            yield np.array(sums).tobytes()
            batch, nbytes = [], 0


def _words(array: mx.array) -> mx.array:
    """The raw bits of each row as uint32."""
    rows = array if array.ndim else array[None]
    if rows.shape[-1] * rows.itemsize % 4 == 0:
        return rows.view(mx.uint32)
    return rows.view(mx.uint16 if rows.itemsize == 2 else mx.uint8).astype(mx.uint32)


def _places(shape: tuple[int, ...]) -> tuple[mx.array, ...]:
    """Indices of `SAMPLES` places, one array per axis. Spread by an irrational step per axis: no two share a row."""
    steps = [(0.6180339887, 0.7548776662, 0.5698402910, 0.8191725134)[axis % 4] for axis in range(len(shape))]
    return tuple(
        mx.array([int((0.5 + number * step) % 1 * size) for number in range(SAMPLES)], mx.uint32)
        for size, step in zip(shape, steps, strict=True)
    )
