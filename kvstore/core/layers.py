"""The engine-neutral schema of cache layers, and the byte order in which raw KV travels.

A `Layout` says what one token's KV is: for every layer a kind, and for its keys and values the head count, the width,
the dtype and, where the engine itself keeps them quantized, bits and group size; for the arrays of state layers which
shapes they may have. It is part of a namespace's identity. Kind strings are ours, never class names of an engine:

    kv      sliceable at any token; travels and is stored in blocks
    window  the last rows of a sliding or chunked window; valid at its exact token count, stored in checkpoints
    state   recurrent or convolution state; valid at its exact token count, stored in checkpoints
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

import msgpack

from kvstore.core.blocks import BLOCK_TOKENS, ITEM_BYTES, RAW, Stack, StateArray, Tensor
from kvstore.core.records import DIMENSIONS_MAX, unpack_record
from kvstore.errors import CorruptDataError, InvalidRequestError

FLOAT_DTYPES = ("BF16", "F16", "F32")
LAYERS_MAX = 4096
# Layouts that are remembered once they are parsed.
LAYOUTS_MAX = 32
HEADS_MAX = 4096
WIDTH_MAX = 65_536
ARRAYS_MAX = 256
# No axis of an MLX array is longer.
SIZE_MAX = (1 << 31) - 1
PARTS = ("keys", "values")

# Kinds of layers, and which parameters each may have, in this order. `rules` has a rule for each of window and state.
FORMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "kv": ((),),
    "window": (("size", "keep"), ("chunk",)),
    "state": (("slots",), ("compressed", "ratio")),
}


@dataclass(frozen=True, slots=True)
class PartSpec:
    """Keys or values of one layer: `heads` rows of `width` numbers a token.

    `bits > 0`: the engine keeps them quantized itself (mlx affine, `group` values a scale); then `dtype` is that of
    scales and biases. `width == 0` is legal and holds nothing (some latent layouts have no values).
    """

    heads: int
    width: int
    dtype: str
    bits: int = 0
    group: int = 0

    def __str__(self) -> str:
        return f"{self.heads}x{self.width} {f'{self.bits} bits' if self.bits else self.dtype}"

    def tensors(self) -> tuple[Tensor, ...]:
        """The raw tensors of this part, without offsets: one `data`, or `codes`, `scales`, `biases`."""
        if self.width == 0:
            return ()
        if not self.bits:
            return (Tensor("data", self.dtype, self.heads, self.width),)
        groups = self.width // self.group
        return (
            Tensor("codes", "U32", self.heads, self.width * self.bits // 32),
            Tensor("scales", self.dtype, self.heads, groups),
            Tensor("biases", self.dtype, self.heads, groups),
        )

    def validate(self) -> None:
        """Raise InvalidRequestError unless every field is in range."""
        if not 0 < self.heads <= HEADS_MAX or not 0 <= self.width <= WIDTH_MAX:
            raise InvalidRequestError(f"heads or width out of range: {self.heads} x {self.width}")
        if self.dtype not in FLOAT_DTYPES:
            raise InvalidRequestError(f"dtype {self.dtype!r} is not one of {', '.join(FLOAT_DTYPES)}")
        if self.bits:
            if self.bits not in (2, 3, 4, 5, 6, 8) or self.group not in (32, 64, 128):
                raise InvalidRequestError(f"no such quantization: {self.bits} bits, group {self.group}")
            if self.width % self.group or self.width * self.bits % 32:
                raise InvalidRequestError(f"width {self.width} does not divide into groups of {self.group}")
        elif self.group:
            raise InvalidRequestError("a group size without bits")


# The part of a layer that has none: state layers, whose arrays have rules of their own.
NO_PART = PartSpec(1, 0, "F32")


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """The shape rule of one array of a window or state layer: what it is, whatever the token count.

    All sizes of `shape` are fixed but that of `axis`, if that is not negative: it has 0 to `rows_max` rows, with a
    `rows_max` of 0 as many as there are tokens. An `optional` array need not be there.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    axis: int = -1
    rows_max: int = 0
    optional: bool = False

    def validate(self) -> None:
        """Raise InvalidRequestError unless every field is in range."""
        if not self.name.isidentifier() or self.dtype not in ITEM_BYTES or len(self.shape) > DIMENSIONS_MAX:
            raise InvalidRequestError(f"no array can be {self.name!r}, {self.dtype!r}, {len(self.shape)} dimensions")
        sizes = (*self.shape, self.rows_max)
        if not all(0 <= size <= SIZE_MAX for size in sizes) or not -1 <= self.axis < len(self.shape):
            raise InvalidRequestError(f"sizes of array {self.name} out of range")
        if self.shape[self.axis] if self.axis >= 0 else self.rows_max:
            raise InvalidRequestError(f"array {self.name}: a growing axis has size 0 in the rule, a fixed one no bound")

    def check(self, array: StateArray, n_tokens: int) -> None:
        """Raise CorruptDataError unless `array` may stand in a layer after `n_tokens` tokens."""
        fixed = [size if axis != self.axis else 0 for axis, size in enumerate(array.shape)]
        if array.dtype != self.dtype or tuple(fixed) != self.shape:
            raise CorruptDataError(f"{self.name}: {array.dtype} {list(array.shape)} is not {self}")
        if self.axis >= 0 and array.shape[self.axis] > (self.rows_max or n_tokens):
            raise CorruptDataError(f"{self.name}: {array.shape[self.axis]} rows after {n_tokens} tokens; it is {self}")

    def __str__(self) -> str:
        rows = f"0..{self.rows_max or 'tokens'}"
        return f"{self.dtype} [{', '.join(rows if i == self.axis else str(n) for i, n in enumerate(self.shape))}]"


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One cache layer. `params`: what else must be equal, as (name, whole number), see `FORMS`.

    `arrays` are the rules of a state layer's arrays; those of a window follow from `keys` and `values`.
    """

    keys: PartSpec
    values: PartSpec
    kind: str = "kv"
    params: tuple[tuple[str, int], ...] = ()
    arrays: tuple[ArraySpec, ...] = ()

    def __str__(self) -> str:
        params = "".join(f" {name} {value}" for name, value in self.params)
        parts = (
            []
            if self.kind == "state"
            else [str(self.keys)] * (self.keys == self.values) or [f"keys {self.keys}", f"values {self.values}"]
        )
        return " ".join([self.kind, *parts]) + params

    @property
    def is_exact(self) -> bool:
        """Whether the layer is valid at its exact token count only."""
        return self.kind != "kv"

    def validate(self) -> None:
        """Raise InvalidRequestError unless the layer can be stored."""
        names = tuple(name for name, _ in self.params)
        if names not in FORMS.get(self.kind, ()) or not all(0 <= value <= SIZE_MAX for _, value in self.params):
            raise InvalidRequestError(f"no layer of kind {self.kind!r} has parameters {self.params}")
        if names and not self.params[0][1]:
            raise InvalidRequestError(f"a layer whose {names[0]} is 0")
        if self.kind == "window" and self.param("keep") >= self.params[0][1]:
            raise InvalidRequestError("a window that keeps all of its rows")
        self.keys.validate()
        self.values.validate()
        widths, bits = self.keys.width or self.values.width, self.keys.bits or self.values.bits
        if bool(widths) != (self.kind != "state") or (bits and self.is_exact):
            raise InvalidRequestError("kv layers and windows have keys or values, only those of kv may be quantized")
        if bool(self.arrays) != (self.kind == "state") or len(self.arrays) > ARRAYS_MAX:
            raise InvalidRequestError(f"a state layer has rules for 1 to {ARRAYS_MAX} arrays, other layers have none")
        if len({array.name for array in self.arrays}) != len(self.arrays):
            raise InvalidRequestError("two rules for one array")
        for array in self.arrays:
            array.validate()

    def param(self, name: str) -> int:
        """A parameter; 0 where the layer has no such parameter."""
        return next((value for key, value in self.params if key == name), 0)

    def part(self, name: str) -> PartSpec:
        """The spec of "keys" or "values"."""
        return self.keys if name == "keys" else self.values


@dataclass(frozen=True)
class Layout:
    """All layers of a cache, in the engine's order, nested ones depth first.

    `tree` says how layers are nested: a "." for each layer, brackets around each nested list; "" when none is.
    """

    layers: tuple[LayerSpec, ...]
    tree: str = ""

    def __repr__(self) -> str:
        """Equal layers are told once."""
        counts = Counter(str(layer) for layer in self.layers)
        return f"<Layout of {', '.join(f'{count} {layer}' for layer, count in counts.items())}>"

    def validate(self) -> None:
        """Raise InvalidRequestError unless the layout can be stored."""
        if not 0 < len(self.layers) <= LAYERS_MAX:
            raise InvalidRequestError(f"a layout has 1 to {LAYERS_MAX} layers, got {len(self.layers)}")
        for layer in self.layers:
            layer.validate()
        if self.tree and not _is_tree(self.tree, len(self.layers)):
            raise InvalidRequestError("the nesting does not fit the layers")

    @functools.cached_property
    def exact_layers(self) -> tuple[int, ...]:
        """Indices of the window and state layers; with any, only positions that have a checkpoint are usable."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.is_exact)

    @functools.cached_property
    def raw_stacks(self) -> tuple[Stack, ...]:
        """Stacks of kv layers of equal geometry in the order in which raw KV travels: keys first, then values."""
        groups: dict[tuple[str, PartSpec], list[int]] = {}
        for part in PARTS:
            for index, layer in enumerate(self.layers):
                if layer.part(part).width and not layer.is_exact:
                    groups.setdefault((part, layer.part(part)), []).append(index)
        return tuple(Stack(part, tuple(index), RAW, spec.tensors()) for (part, spec), index in groups.items())

    @functools.cached_property
    def token_bytes(self) -> int:
        """Bytes of one token's raw KV over all kv layers."""
        return sum(stack.nbytes(1) for stack in self.raw_stacks)

    def layer_token_bytes(self, index: int) -> int:
        """Bytes of one token's raw KV in one layer; 0 for window and state layers."""
        layer = self.layers[index]
        if layer.is_exact:
            return 0
        return sum(t.layer_bytes(1) for part in PARTS for t in layer.part(part).tensors())

    @functools.cached_property
    def record(self) -> bytes:
        """The serial form: msgpack of the distinct layers and, in order, which one each layer is."""
        distinct = list(dict.fromkeys(self.layers))
        index = {layer: i for i, layer in enumerate(distinct)}
        packed: bytes = msgpack.packb(
            [
                [(s.kind, astuple(s.keys), astuple(s.values), s.params, [*map(astuple, s.arrays)]) for s in distinct],
                [index[s] for s in self.layers],
                self.tree,
            ]
        )
        return packed

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of the record: what a namespace is bound to."""
        return hashlib.sha256(b"kvstore/layout/v2\0" + self.record).digest()

    @staticmethod
    def from_record(record: bytes) -> Layout:
        """Parse and validate; InvalidRequestError when it is not a layout."""
        return _parsed(record)


@functools.lru_cache(maxsize=LAYOUTS_MAX)
def _parsed(record: bytes) -> Layout:
    """See `Layout.from_record`. Every request names one of few layouts, and what follows from a layout it remembers."""
    try:
        distinct, order, tree = unpack_record(record)
        if len(order) > LAYERS_MAX or len(distinct) > LAYERS_MAX:
            raise InvalidRequestError("too many layers")
        specs = [
            LayerSpec(_part(keys), _part(values), str(kind), _params(params), tuple(_array(*one) for one in arrays))
            for kind, keys, values, params, arrays in distinct
        ]
        layout = Layout(tuple(specs[_index(i, len(specs))] for i in order), str(tree))
        layout.validate()
    except (CorruptDataError, TypeError, ValueError) as error:
        raise InvalidRequestError(f"not a layout: {error}") from error
    return layout


def _is_tree(tree: str, n_layers: int) -> bool:
    """Whether `tree` is balanced brackets around exactly `n_layers` dots."""
    depth = 0
    for sign in tree:
        depth += {"(": 1, ")": -1, ".": 0}.get(sign, -LAYERS_MAX)
        if depth < 0:
            return False
    return depth == 0 and tree.count(".") == n_layers and "()" not in tree


def _part(fields: Any) -> PartSpec:
    # 64.0 and true would pass for numbers here, and then break sums of bytes far from where they came in.
    heads, width, dtype, bits, group = fields
    if not isinstance(dtype, str) or any(type(number) is not int for number in (heads, width, bits, group)):
        raise ValueError("a part is heads, width, dtype, bits and group, all but the dtype whole numbers")
    return PartSpec(heads, width, dtype, bits, group)


def _params(pairs: Any) -> tuple[tuple[str, int], ...]:
    if any(not isinstance(name, str) or type(value) is not int for name, value in pairs):
        raise ValueError("layer parameters are names and whole numbers")
    return tuple((name, value) for name, value in pairs)


def _array(name: Any, dtype: Any, shape: Any, axis: Any, rows_max: Any, optional: Any) -> ArraySpec:
    if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(optional, bool):
        raise ValueError("the rule of an array is name, dtype, shape, axis, bound and whether it is optional")
    if any(type(number) is not int for number in (*shape, axis, rows_max)):
        raise ValueError("the sizes of an array are whole numbers")
    return ArraySpec(name, dtype, tuple(shape), axis, rows_max, optional)


def _index(value: Any, limit: int) -> int:
    if type(value) is not int or not 0 <= value < limit:
        raise ValueError("layer index out of range")
    return value


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens `[start, end)` of a sequence, in one block and of one origin: the unit in which raw KV is sent.

    Its bytes are, for each stack of `Layout.raw_stacks`, each tensor, each layer of it: `[heads, tokens, width]`.
    That is exactly the payload of a raw blob of these tokens. `restored` says that the values came out of the store.
    """

    start: int
    end: int
    restored: bool = False

    @property
    def n_tokens(self) -> int:
        """Tokens in the piece."""
        return self.end - self.start


def cut_pieces(start: int, end: int, restored_tokens: int = 0, block_tokens: int = BLOCK_TOKENS) -> list[Piece]:
    """Cut `[start, end)` at block boundaries and at the end of what was restored. Both sides compute the same list."""
    edges = {start, end, *range((start // block_tokens + 1) * block_tokens, end, block_tokens)}
    if start < restored_tokens < end:
        edges.add(restored_tokens)
    ordered = sorted(edges)
    return [Piece(a, b, a < restored_tokens) for a, b in itertools.pairwise(ordered)]


def raw_ranges(layout: Layout, n_tokens: int) -> Iterator[tuple[Stack, Tensor, int, int, int]]:
    """Where each layer's raw bytes lie in a piece: (stack, tensor, layer index, offset, length)."""
    offset = 0
    for stack in layout.raw_stacks:
        for tensor in stack.tensors:
            length = tensor.layer_bytes(n_tokens)
            for layer in stack.layers:
                yield stack, tensor, layer, offset, length
                offset += length


@dataclass(frozen=True, slots=True)
class KVLayer:
    """Arrays of one cache layer. They belong to the engine or caller that supplied them.

    `keys` and `values` hold one array per tensor of their spec, each `[1, heads, capacity, width]` with
    `capacity >= n_tokens`; what lies beyond `n_tokens` is head-room or stale and is never stored.
    """

    spec: LayerSpec
    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    n_tokens: int

    def __repr__(self) -> str:
        """Without the arrays, which would be evaluated to be printed."""
        return f"<KVLayer {self.spec}, {self.n_tokens} tokens>"

    def part(self, name: str) -> tuple[Any, ...]:
        """The arrays of "keys" or "values"."""
        return self.keys if name == "keys" else self.values


@dataclass(frozen=True, slots=True)
class StateLayer:
    """A window or state layer after exactly `n_tokens` tokens. Its arrays belong to the engine or caller.

    `arrays` by name; an empty slot of the engine has no entry. `numbers`: integers of the layer, such as a ring index.
    `rules` says which arrays and numbers a layer may have.
    """

    spec: LayerSpec
    arrays: tuple[tuple[str, Any], ...]
    numbers: tuple[tuple[str, int], ...]
    n_tokens: int

    def __repr__(self) -> str:
        """Without the arrays, which would be evaluated to be printed."""
        return f"<StateLayer {self.spec}, {self.n_tokens} tokens>"
